"""Write a model in another format. For now into a Hugging Face folder, from anything that camelid opens."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("--to", choices=["hf"], default="hf")
    parser.add_argument("--out", required=True)
    settings.example(parser, "camelid convert model.gguf --to hf --out models/full")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.formats.convert import to_hf

    found = to_hf(options.model, options.out)
    print(f"{found['before']['bytes']:,} -> {found['after']['bytes']:,} bytes in {found['out']}", file=sys.stderr)
    return found
