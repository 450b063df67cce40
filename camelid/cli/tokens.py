"""Documents to packed, memory-mapped token shards."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="build")
    build = actions.add_parser("build", help="make a tokens folder")
    build.add_argument("corpus")
    build.add_argument("--tokenizer", required=True)
    build.add_argument("--out", required=True)
    settings.example(build, "camelid tokens build out/corpus --tokenizer out/tokenizer --out out/tokens")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.artifact import read_manifest
    from camelid.corpus import documents
    from camelid.formats.load import load_tokenizer, located
    from camelid.report.progress import followed
    from camelid.tokens.write import build

    tokenizer = located(options.tokenizer)
    inputs = [Path(options.corpus), tokenizer]
    size = int(read_manifest(inputs[0]).get("text_bytes", 0))
    texts = followed(documents(options.corpus), "tokens", size, options.json)
    result = build(texts, load_tokenizer(tokenizer), options.out, inputs)
    print(f"{result['tokens']:,} tokens of {result['documents']:,} documents -> {options.out}", file=sys.stderr)
    return result
