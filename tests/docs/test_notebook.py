"""The tutorial notebook runs from top to bottom, and what its cells end in is shown."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"


def cells() -> list[str]:
    whole = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in whole["cells"] if cell["cell_type"] == "code"]


def run(source: str, names: dict[str, Any]) -> Any:
    """A cell as a notebook runs it: the value of its last line, if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)  # noqa: S102 (our own notebook)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)  # noqa: S307


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = [run(cell, names) for cell in cells()]
    pages = [value._repr_html_() for value in shown if hasattr(value, "_repr_html_") and hasattr(value, "parts")]
    assert len(pages) == 4
    assert all(page.startswith("<iframe srcdoc=") and "<script>alert" not in page for page in pages)
    assert "面" in pages[0]
    assert sum(names["losses"][-10:]) / 10 < names["losses"][0] - 2  # it learned
    told = capsys.readouterr().out
    assert "Tokenizer(1,024 tokens, byte-level" in told
    assert "Engine(" in told


def test_no_outputs_are_kept() -> None:
    whole = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert all(cell.get("outputs", []) == [] for cell in whole["cells"])
