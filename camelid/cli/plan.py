"""What a recipe will need, before it runs: memory by part, speed, hours, money."""

from __future__ import annotations

import argparse
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", default=[], help="overrides such as train.steps=400")
    parser.add_argument("--price", type=float, default=0.0, metavar="P", help="of one hour of this machine")
    parser.add_argument("--no-probe", action="store_true", help="do not time steps: memory only")
    parser.add_argument("--budget", metavar="TIME", help='choose shape, tokens and rate for "2h", "45m", …')
    parser.add_argument("--depth", type=int, metavar="N", help="choose shape, tokens and rate for N layers")
    settings.example(parser, "camelid plan recipes/small.toml --price 2.5")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.finetune import job
    from camelid.train.budget import wished
    from camelid.train.estimate import estimate
    from camelid.train.pretrain import planned

    recipe = wished(options.recipe, options.settings, options.budget, options.depth, quiet=options.json)
    make = job.planned if recipe.finetune or recipe.model.from_ else planned
    found = estimate(recipe, make, price=options.price, probe=not options.no_probe)
    if not options.json:
        for name, size in found["memory_bytes"].items():
            print(f"{name:<12} {size / 2**20:10,.0f} MiB")
        print(f"{found['parameters']:,} weights; {found['said']}")
        if "schedule" in found:
            print(found["schedule"])
    return found
