"""Train a new model on packed tokens, as a recipe says."""

from __future__ import annotations

import argparse
from typing import Any

from camelid.cli import training


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", metavar="TIME", help='choose shape, tokens and rate for "2h", "45m", …')
    parser.add_argument("--depth", type=int, metavar="N", help="choose shape, tokens and rate for N layers")
    training.arguments(parser, "camelid pretrain recipes/small.toml train.steps=400 log.out=runs/b")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.train import pretrain
    from camelid.train.budget import wished

    recipe = wished(options.recipe, options.settings, options.budget, options.depth, options.resume, options.json)
    return training.run(options, recipe, pretrain)
