"""The house's rules: imports go down, files stay readable, nothing unsafe is called, help is instant."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "camelid"
FLOORS = [
    {"errors", "disk", "child", "artifact", "report"},
    {"recipe"},
    {"kernels"},
    {"model"},
    {"tokenizer"},
    {"tokens", "corpus"},
    {"formats"},
    {"generate"},
    {"evaluate"},
    {"quantize"},
    {"train"},
    {"finetune"},
    {"serve", "verify", "reproduce", "doctor", "here", "auto", "notebook", "quickstart", "bench"},
    {"cli", "__main__"},
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path, source: str) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("camelid."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "camelid":
            rooms |= {alias.name for alias in node.names if alias.name in FLOOR}
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("camelid.")}
    return rooms


def climbs(path: Path, source: str) -> set[str]:
    """Rooms that `path` may not import: above its own floor."""
    own = room(path)
    return {r for r in imported_rooms(path, source) if r != own and FLOOR[r] > FLOOR[own]}


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "__init__.py" or f.parent != PACKAGE], ids=str)
def test_imports_go_down(path: Path) -> None:
    assert not climbs(path, path.read_text())


def imported_files(path: Path) -> set[Path]:
    """The files of ours that a file imports, wherever in it, for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("camelid"):
            within = PACKAGE.parent.joinpath(*(node.module or "").split("."))
            found |= {within / f"{alias.name}.py" for alias in node.names} | {within.with_suffix(".py")}
    return {f for f in found if f.exists()}


def test_no_two_files_go_in_a_circle() -> None:
    assert tuple(TopologicalSorter({path: imported_files(path) for path in FILES}).static_order())
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_the_import_rule_bites() -> None:
    assert climbs(PACKAGE / "model" / "rope.py", "from camelid.train.loop import run") == {"train"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


UNSAFE = re.compile(r"\b(pickle\.loads?|torch\.load|yaml\.load|eval|exec)\(|shell=True|trust_remote_code")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_unsafe_is_called(path: Path) -> None:
    code = re.sub(r"\.eval\(\)", "", path.read_text())  # Module.eval() is evaluation mode
    assert not UNSAFE.search(code)


INSIDE = r"(?:[^()]|\((?:[^()]|\([^()]*\))*\))*"
TEXT_FILE = re.compile(rf"""\.(?:read_text|write_text)\({INSIDE}\)|\bopen\((?:{INSIDE}["'][rwxa]\+?["']{INSIDE})?\)""")


def without_encoding(source: str) -> list[str]:
    found = [match[0] for match in TEXT_FILE.finditer(source)]
    return [m for m in found if "encoding" not in m and "zip64" not in m]  # members of an archive are bytes


@pytest.mark.parametrize("path", FILES, ids=str)
def test_text_files_are_utf8_whatever_the_locale(path: Path) -> None:
    assert without_encoding(path.read_text(encoding="utf-8")) == []


def test_the_encoding_rule_bites() -> None:
    for wrong in ("p.read_text()", 'p.write_text(f(g(x)) + "y")', 'open(path, "w")', 'p.open("a")', "p.open()"):
        assert [wrong.endswith(found) for found in without_encoding(wrong)] == [True]
    assert without_encoding('p.open("rb"); open(p, "r", encoding="utf-8"); archive.open(member)') == []


@pytest.mark.parametrize("path", [f for f in FILES if not f.name.startswith("peer_")], ids=str)
def test_peers_are_never_imported(path: Path) -> None:
    assert not re.search(r"^\s*(import|from) (transformers|peft|vllm|gguf|llama_cpp)\b", path.read_text(), re.M)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, camelid.cli; camelid.cli.run(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1]
    assert not [name for name in ("torch", "numpy", "pydantic", "tokenizers", "rich") if f"'{name}'" in loaded]


def test_every_verb_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    from camelid.cli import VERBS, run

    actions = {
        "corpus": ["build"],
        "tokenizer": ["train"],
        "tokens": ["build"],
        "evaluate": ["perplexity"],
        "bench": ["data"],
    }
    for verb in VERBS:
        with pytest.raises(SystemExit):
            run([verb, *actions.get(verb, []), "-h"])
        assert "example:" in capsys.readouterr().out, verb


@pytest.mark.nightly
def test_help_is_instant() -> None:
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "camelid", "--help"], check=True, capture_output=True)
    assert time.monotonic() - started < 0.3
