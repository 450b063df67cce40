"""Teach a model from conversations, as a recipe says."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", help="overrides such as train.steps=400")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of log.out")
    settings.example(parser, "camelid finetune recipes/sft.toml model.from=runs/small data.files='[\"chats.jsonl\"]'")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.recipe import load
    from camelid.train import finetune

    result = finetune(load(options.recipe, options.settings), resume=options.resume, quiet=options.json)
    print(
        f"{result['steps']} steps, loss {result['loss']:.4f}, {result['tokens_per_second']:,.0f} tokens/s "
        f"-> {result['checkpoint']}",
        file=sys.stderr,
    )
    return result
