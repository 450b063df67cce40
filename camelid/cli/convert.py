"""Write a model in another format: a Hugging Face folder, one of Meta's or a GGUF file, from anything that camelid
opens."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("--to", choices=["hf", "meta", "gguf"], default="hf", help="the format to write")
    parser.add_argument(
        "--type", help="of GGUF's matrices: F32, F16 (the default), BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M or Q4_0"
    )
    parser.add_argument(
        "--shards", type=int, default=1, help="files of Meta's format: as many as its code starts processes"
    )
    parser.add_argument("--out", required=True)
    parser.add_argument(
        "--data",
        help="measure what it cost, on a text, corpus or tokens folder: both models are then opened in float32",
    )
    parser.add_argument("--tokens", type=int, default=65536, help="whole windows of it, until so many are read")
    settings.example(parser, "camelid convert model.gguf --to hf --out models/full")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.formats.convert import convert
    from camelid.quantize.job import cost_of, measured_windows

    if options.data:
        measured_windows(options.model, options.data, options.tokens)  # a typing error is told before the work
    kind = options.type.upper() if options.type else None
    found = convert(options.model, options.out, options.to, options.shards, kind, options.json)
    print(f"{found['before']['bytes']:,} -> {found['after']['bytes']:,} bytes in {found['out']}", file=sys.stderr)
    if options.data:
        cost = cost_of(options.model, options.out, options.data, options.tokens, options.json)
        told = f"perplexity {cost['token_perplexity_before']:.4f} -> {cost['token_perplexity_after']:.4f}"
        told += f", KL {cost['kl']:.5f} nats (99.9 % below {cost['kl_p999']:.4f})"
        print(f"{told}, same likeliest token {cost['top1_agreement']:.2%}\n{cost['protocol']}", file=sys.stderr)
        found |= {"cost": cost}
    return found
