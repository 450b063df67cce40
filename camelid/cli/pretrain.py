"""Train a new model on packed tokens, as a recipe says."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", help="overrides such as train.steps=400")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of log.out")
    settings.example(parser, "camelid pretrain recipes/small.toml train.steps=400 log.out=runs/b")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.recipe import load
    from camelid.train import pretrain

    result = pretrain(load(options.recipe, options.settings), resume=options.resume, quiet=options.json)
    print(
        f"{result['steps']} steps, loss {result['loss']:.4f}, {result['tokens_per_second']:,.0f} tokens/s "
        f"-> {result['checkpoint']}",
        file=sys.stderr,
    )
    return result
