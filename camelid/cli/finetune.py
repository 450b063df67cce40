"""Teach a model from conversations, as a recipe says."""

from __future__ import annotations

import argparse
from typing import Any

from camelid.cli import training


def arguments(parser: argparse.ArgumentParser) -> None:
    training.arguments(parser, "camelid finetune recipes/sft.toml model.from=runs/small 'data.files=[\"chats.jsonl\"]'")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.train import finetune

    return training.run(options, finetune)
