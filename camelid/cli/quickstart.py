"""The whole life of a LLaMA on real text already on this machine, the Python standard library: corpus, tokenizer,
pre-training, fine-tuning, evaluation, a report, and a model to chat with."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="quickstart")
    parser.add_argument("--minutes", type=float, default=8.0, help="about how long to take")
    settings.example(parser, "camelid quickstart --out quickstart --minutes 8")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.quickstart import run as live

    result = live(options.out, options.minutes, quiet=options.json)
    if not options.json:
        figures = result["compression"]
        rates = [("model", figures["model"]["bits_per_byte"])] + [(k, v) for k, v in figures.items() if k != "model"]
        print("held-out bits per byte: " + ", ".join(f"{name} {value:.3f}" for name, value in rates))
        for name, scores in result["docstrings"]["scores"].items():
            bleu, rouge = scores["bleu"]["bleu"]["score"], 100 * scores["rouge"]["rougeL"]["fmeasure"]
            print(f"docstrings, {name}: BLEU {bleu:.2f}, ROUGE-L {rouge:.2f}")
        print(f"{result['seconds'] / 60:.1f} minutes. Report: {result['report']}")
        print(f"Talk to it: {_command()} chat {result['model']} --temperature 0")
    return result


def _command() -> str:
    """How this program was called, so that the line can be pasted."""
    return sys.argv[0] if sys.argv[0].endswith("camelid") else "camelid"
