"""Files, folders and globs to clean documents, with every document and byte accounted for."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="build")
    build = actions.add_parser("build", help="make a corpus folder")
    build.add_argument("inputs", nargs="+", help="files, folders, globs; then settings such as min_characters=200")
    build.add_argument("--out", required=True, help="the corpus folder to make")
    build.set_defaults(settings=[])
    settings.example(build, "camelid corpus build texts/ 'more/*.jsonl.gz' --out out/corpus min_characters=200")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.corpus import build
    from camelid.corpus.filters import Limits

    inputs, given = settings.split([*options.inputs, *options.settings])
    result = build(inputs, options.out, settings.build(Limits, given), quiet=options.json)
    d, b = result["documents"], result["bytes"]
    print(
        f"kept {d['kept']:,} of {d['read']:,} documents, {b['kept']:,} of {b['read']:,} bytes; dropped "
        f"{d['dropped'] or 'none'}, quarantined {d['quarantined'] or 'none'} -> {options.out}",
        file=sys.stderr,
    )
    return result
