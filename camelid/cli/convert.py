"""Write a model in another format: a Hugging Face folder or one of Meta's, from anything that camelid opens."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("--to", choices=["hf", "meta"], default="hf")
    parser.add_argument(
        "--shards", type=int, default=1, help="files of Meta's format: as many as its code starts processes"
    )
    parser.add_argument("--out", required=True)
    settings.example(parser, "camelid convert model.gguf --to hf --out models/full")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.formats.convert import convert

    found = convert(options.model, options.out, options.to, options.shards)
    print(f"{found['before']['bytes']:,} -> {found['after']['bytes']:,} bytes in {found['out']}", file=sys.stderr)
    return found
