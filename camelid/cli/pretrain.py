"""Train a new model on packed tokens, as a recipe says."""

from __future__ import annotations

import argparse
from typing import Any

from camelid.cli import training


def arguments(parser: argparse.ArgumentParser) -> None:
    training.arguments(parser, "camelid pretrain recipes/small.toml train.steps=400 log.out=runs/b")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.train import pretrain

    return training.run(options, pretrain)
