"""What several verbs have: `key=value` settings, an example in the help, a text from a file or stdin."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from camelid.errors import InputError


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Positional words and `key=value` settings, apart. A word is a setting when its key is a dotted name."""
    settings = [w for w in words if "=" in w and all(part.isidentifier() for part in w.partition("=")[0].split("."))]
    return [w for w in words if w not in settings], settings


def text_of(path: str) -> str:
    """A file's text, without a byte order mark, or with - that of stdin, each character of it; line ends are as they
    are. Raises InputError for what cannot be read as UTF-8."""
    try:
        if path != "-":
            return Path(path).read_bytes().decode("utf-8-sig")
        raw = getattr(sys.stdin, "buffer", None)
        return raw.read().decode("utf-8") if raw else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{'standard input' if path == '-' else path} is not UTF-8: {error}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def example(parser: argparse.ArgumentParser, text: str) -> None:
    """Show an example at the end of the help."""
    parser.epilog = f"example:\n  {text}"
