"""Real text on every machine: the standard library's sources and docs, and function -> docstring pairs from them.

Whole top-level modules are held out, chosen by a hash of their name, so neither their code nor their docstrings are
seen in training. Held-out pairs whose docstring or code also stands in a training module are left out as well.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "config"}
HELD_OUT_BYTES = 400_000
MAX_WORDS, MIN_WORDS, MAX_LINES = 30, 3, 12


@dataclass(frozen=True)
class Pair:
    """A function's source without its docstring, and the docstring's first paragraph on one line."""

    name: str
    code: str
    docstring: str
    source: str


def standard_library() -> Path:
    """Where the interpreter's own library lies."""
    return Path(sysconfig.get_paths()["stdlib"])


def find_sources(root: Path) -> list[Path]:
    """Every source file of the library, without tests and installed packages."""
    return sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts[:-1]))


def module_of(path: Path, root: Path) -> str:
    """The top-level module or package a file belongs to."""
    return path.relative_to(root).parts[0].removesuffix(".py")


def split(
    files: Sequence[Path], root: Path, seed: int, held_out_bytes: int = HELD_OUT_BYTES
) -> tuple[list[Path], list[Path]]:
    """(training files, held-out files): modules in order of their hash are held out until the bytes suffice."""
    modules: dict[str, list[Path]] = {}
    for path in files:
        modules.setdefault(module_of(path, root), []).append(path)
    sizes = {name: sum(p.stat().st_size for p in paths) for name, paths in modules.items()}
    held: set[str] = set()
    filled = 0
    for name in sorted(modules, key=lambda m: hashlib.sha256(f"{seed}:{m}".encode()).digest()):
        if filled >= held_out_bytes:
            break
        if sizes[name] <= held_out_bytes / 2:  # one giant module would be the whole measure
            held.add(name)
            filled += sizes[name]
    train = [p for p in files if module_of(p, root) not in held]
    return train, [p for p in files if module_of(p, root) in held]


def pairs(files: Sequence[Path]) -> list[Pair]:
    """Every documented function of the files."""
    found: list[Pair] = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, ValueError):  # templates and old-encoding samples live beside real modules
            continue
        lines = text.split("\n")
        found += [pair for node in _functions(tree) if (pair := _pair(node, lines, str(path)))]
    return found


def unseen(candidates: Sequence[Pair], training: Sequence[Pair]) -> list[Pair]:
    """The candidates whose docstring and code occur in no training pair."""
    docstrings = {p.docstring.lower() for p in training}
    codes = {p.code for p in training}
    return [p for p in candidates if p.docstring.lower() not in docstrings and p.code not in codes]


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], source: str) -> Pair | None:
    docstring = ast.get_docstring(node)
    if not docstring or node.name.startswith("__") or len(node.body) < 2:
        return None
    summary = " ".join(docstring.split("\n\n")[0].split())
    if not MIN_WORDS <= len(summary.split()) <= MAX_WORDS or not re.search(r"[a-z]{3}", summary):
        return None
    first = node.body[0]
    head = lines[node.lineno - 1 : first.lineno - 1]
    body = lines[first.end_lineno or first.lineno : node.end_lineno]
    kept = [line for line in head + body if line.strip()][:MAX_LINES]
    indent = len(kept[0]) - len(kept[0].lstrip())
    code = "\n".join(line[indent:] if not line[:indent].strip() else line.lstrip() for line in kept)
    return Pair(node.name, code, summary, source)


def words(name: str) -> list[str]:
    """The words of an identifier: getHTTPResponse_code -> get http response code."""
    return [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
