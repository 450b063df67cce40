"""Where a folder came from: every input, back to the raw files; a * marks what changed since."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder")
    settings.example(parser, "camelid lineage runs/small")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.artifact import MANIFEST, lineage
    from camelid.formats.load import resolve

    folder = Path(options.folder)
    node = lineage(folder if (folder / MANIFEST).exists() else resolve(folder))
    if not options.json:
        _print(node, 0)
    return node


def _print(node: dict[str, Any], depth: int) -> None:
    mark = " *" if node.get("changed") else ""
    print(f"{'  ' * depth}{node['kind']:<10} {node['path']}{mark}")
    shown = node["inputs"][:20]
    for child in shown:
        _print(child, depth + 1)
    if len(node["inputs"]) > len(shown):
        print(f"{'  ' * (depth + 1)}… and {len(node['inputs']) - len(shown):,} more (--json lists all)")
