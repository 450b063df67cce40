"""Put an adapter into the weights of its full-precision base; says by how much the logits change."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="a run of `camelid finetune`, or a folder in PEFT's format")
    parser.add_argument("--out", required=True)
    settings.example(parser, "camelid merge runs/lora --out models/merged")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.formats.merge import merge_adapter

    found = merge_adapter(options.adapter, options.out)
    print(
        f"merged in {found['dtype']}: the largest logit change is {found['largest_logit_change']:.2g} (the largest "
        f"logit is {found['largest_logit']:.3g}) -> {found['out']}",
        file=sys.stderr,
    )
    return found
