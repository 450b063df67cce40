"""Processes of our own."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[1])


def python(code: str, *words: str) -> list[str]:
    """The words that run `code`, which may import camelid, with `words` in sys.argv. Nothing is imported from the
    folder that it is started in, as `python -m` would: that folder may be a stranger's, with a json.py in it."""
    return [sys.executable, "-P", "-c", f"import sys; sys.path.append({ROOT!r}); {code}", *words]
