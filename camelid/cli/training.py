"""What `pretrain` and `finetune` share: a recipe, overrides, --resume, and the closing line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", help="overrides such as train.steps=400")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of log.out")
    settings.example(parser, example)


def run(options: argparse.Namespace, train: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    from camelid.recipe import load

    result = train(load(options.recipe, options.settings), resume=options.resume, quiet=options.json)
    print(
        f"{result['steps']} steps, loss {result['loss']:.4f}, {result['tokens_per_second']:,.0f} tokens/s "
        f"-> {result['checkpoint']}",
        file=sys.stderr,
    )
    return result
