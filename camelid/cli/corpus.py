"""Files, folders and globs to clean documents, with every document and byte accounted for."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="build")
    build = actions.add_parser("build", help="make a corpus folder")
    build.add_argument("inputs", nargs="*", help="files, folders, globs, - for stdin; then settings such as workers=4")
    build.add_argument("--out", required=True, help="the corpus folder to make")
    build.add_argument("--recipe", help="a recipe with a [corpus] section")
    build.set_defaults(settings=[])
    settings.example(build, "camelid corpus build texts/ 'more/*.jsonl.gz' --out out/corpus min_characters=200")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.corpus import build
    from camelid.corpus.report import conservation
    from camelid.recipe import load

    inputs, given = settings.split([*options.inputs, *options.settings])
    recipe = load(options.recipe, [f"corpus.{setting}" for setting in given])
    with tempfile.TemporaryDirectory() as scratch:
        inputs = [_spooled(Path(scratch)) if name == "-" else name for name in inputs]
        result = build(inputs, options.out, recipe.corpus, quiet=options.json)
    for unit in ("documents", "bytes"):
        print(conservation(result[unit], unit), file=sys.stderr)
    for outcome in ("dropped", "quarantined"):
        for reason, count in result["documents"][outcome].items():
            print(f"  {outcome:<11} {reason:<32} {count:>9,} documents {result['bytes'][outcome][reason]:>15,} bytes",
                  file=sys.stderr)  # fmt: skip
    print(f"-> {options.out} (report.html shows what went, and why)", file=sys.stderr)
    return result


def _spooled(scratch: Path) -> str:
    """Standard input in a file: workers need something they can open. Its kind is told by its content."""
    path = scratch / "stdin"
    with path.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return str(path)
