"""The reference says what the code says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from camelid import cli, recipe

ROOT = Path(__file__).parents[2]


def test_it_is_made_from_this_code() -> None:
    words = [sys.executable, str(ROOT / "tools" / "reference.py"), "--check"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_left_out() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for verb in cli.VERBS:
        assert f"\n### {verb}\n" in text
        for leaf in cli.leaves(cli.parser_of(verb)[1]).values():
            options = [name for action in leaf._actions for name in action.option_strings]
            assert all(f"`{name}" in text or name in ("-h", "--help", "--json") for name in options)
    for section in recipe.Recipe.model_fields:
        assert f"\n### [{section}]\n" in text
