"""Teach a model as a recipe says: answers, or which of two is better; all weights, or an adapter."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from camelid.cli import training


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--show-mask", type=int, metavar="N", nargs="?", const=3,
        help="print N examples with what is learned of them in colour, and train nothing",
    )  # fmt: skip
    training.arguments(parser, "camelid finetune recipes/lora.toml model.from=runs/b 'data.files=[\"chats.jsonl\"]'")


def run(options: argparse.Namespace) -> dict[str, Any]:
    if options.show_mask is not None:
        return _masks(options)
    from camelid.finetune import finetune
    from camelid.recipe import load

    result = training.run(options, load(options.recipe, options.settings), finetune)
    for when in ("before", "after") if "task" in result else ():
        figures = ", ".join(f"{k} {_figure(v)}" for k, v in result["task"][when].items() if _figure(v))
        print(f"{when}: {figures}", file=sys.stderr)
    if "task" in result:
        if "warning" in result["task"]["after"]:
            print(f"warning: {result['task']['after']['warning']}", file=sys.stderr)
        print(f"({result['task']['protocol']}; the answers are in answers.html beside the report)", file=sys.stderr)
    return result


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("score", value.get("fmeasure"))
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _masks(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.finetune.material import masks
    from camelid.finetune.show import shown
    from camelid.recipe import load

    examples, tokenizer, founds = masks(load(options.recipe, options.settings), options.show_mask, options.json)
    if not options.json:
        print(shown(examples, tokenizer, colour=sys.stdout.isatty()))
    counts = [{"tokens": len(e.ids), "learned": e.learned()} for e in examples]
    return {"examples": counts, "bad_rows": sum(len(f.bad) for f in founds)}
