"""`key=value` settings of verbs without a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Positional words and `key=value` settings, apart. A word is a setting when its key is a dotted name."""
    settings = [w for w in words if "=" in w and all(part.isidentifier() for part in w.partition("=")[0].split("."))]
    return [w for w in words if w not in settings], settings


def example(parser: argparse.ArgumentParser, text: str) -> None:
    """Show an example at the end of the help."""
    parser.epilog = f"example:\n  {text}"
