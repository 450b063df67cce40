"""What `pretrain` and `finetune` share: a recipe, overrides, --resume, and the closing line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from camelid.cli import settings

if TYPE_CHECKING:
    from camelid.recipe import Recipe


def arguments(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", default=[], help="overrides such as train.steps=400")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of log.out")
    settings.example(parser, example)


def run(options: argparse.Namespace, recipe: Recipe, train: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    result = train(recipe, resume=options.resume, quiet=options.json)
    loss = "no loss" if result["loss"] is None else f"loss {result['loss']:.4f}"
    used = result["utilization"]
    print(
        f"{result['steps']} steps, {loss}, {result['tokens_per_second']:,.0f} tokens/s "
        f"({used['value']:.0%} of {used['of']}), memory {result['measured']['memory_bytes'] / 2**20:,.0f} MiB "
        f"(planned {result['planned']['memory_bytes'] / 2**20:,.0f}) -> {result['checkpoint']}",
        file=sys.stderr,
    )
    if held := result.get("held_out"):
        before, after = held["before"], held["after"]
        told = (f"{name} {before[name]:.4g} -> {after[name]:.4g}" for name in before if name in after)
        print(f"held out: {', '.join(told)}", file=sys.stderr)
    if result["skipped_steps"]:
        print(f"{result['skipped_steps']} steps were skipped: see metrics.jsonl", file=sys.stderr)
    if stopped := result.get("stopped_by"):
        print(f"stopped by {stopped} after saving: go on with --resume", file=sys.stderr)
        if stopped == "SIGINT":
            raise KeyboardInterrupt
    return result
