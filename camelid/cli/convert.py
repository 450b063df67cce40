"""Write a model in another format: a Hugging Face folder, one of Meta's or a GGUF file, from anything that camelid
opens."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("--to", choices=["hf", "meta", "gguf"], default="hf")
    parser.add_argument(
        "--type", default="F16", help="of GGUF's matrices: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M or Q4_0"
    )
    parser.add_argument(
        "--shards", type=int, default=1, help="files of Meta's format: as many as its code starts processes"
    )
    parser.add_argument("--out", required=True)
    settings.example(parser, "camelid convert model.gguf --to hf --out models/full")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.formats.convert import convert

    found = convert(options.model, options.out, options.to, options.shards, options.type.upper(), options.json)
    print(f"{found['before']['bytes']:,} -> {found['after']['bytes']:,} bytes in {found['out']}", file=sys.stderr)
    return found
