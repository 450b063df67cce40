"""`key=value` settings of verbs without a recipe, checked against a dataclass."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from camelid.errors import InputError

T = TypeVar("T")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Positional words and `key=value` settings, apart. A word is a setting when its key is an identifier."""
    settings = [w for w in words if "=" in w and w.partition("=")[0].isidentifier()]
    return [w for w in words if w not in settings], settings


def build(kind: type[T], settings: Sequence[str]) -> T:
    """A dataclass from settings. Raises InputError naming the key, the nearest valid key, or the type."""
    known: dict[str, Any] = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise InputError(
                f"unknown setting {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
            )
        wanted = type(known[key].default)
        try:
            values[key] = wanted(text)
        except ValueError:
            raise InputError(f"{key} is {text!r}, not {wanted.__name__}") from None
    return kind(**values)


def example(parser: argparse.ArgumentParser, text: str) -> None:
    """Show an example at the end of the help."""
    parser.epilog = f"example:\n  {text}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
