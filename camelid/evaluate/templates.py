"""Tasks as TOML files: how a row of data becomes a question. Ours are in tasks/; a user gives a path to one more."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any, TypeVar

from camelid.disk import sha256_file
from camelid.errors import InputError

TASKS = Path(__file__).parent / "tasks"
Made = TypeVar("Made")


def template_path(name: str) -> Path:
    """Where a template is: one of ours by name, or a path."""
    return Path(name) if name.endswith(".toml") else TASKS / f"{name}.toml"


def template_label(name: str) -> str:
    """A template in a protocol, by name and hash: two tasks of one name may ask different things."""
    path = template_path(name)
    return f"{path.stem} {sha256_file(path)[:8]}"


def read_template(name: str, required: Sequence[str], optional: Mapping[str, type] | None = None) -> dict[str, Any]:
    """A task's template: one of ours by name, or a TOML file. Raises InputError naming what is missing, unknown or of
    another type."""
    path = template_path(name)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        known = ", ".join(sorted(p.stem for p in TASKS.glob("*.toml")))
        raise InputError(f"no task template {name}: {error}; known are {known}, or give a .toml file") from None
    for key in required:
        if not isinstance(found.get(key), str):
            raise InputError(f"{path} lacks the field {key!r}, or it is not a text")
    for key, value in found.items():
        kind = str if key in required else (optional or {}).get(key)
        if kind is None:
            known = ", ".join([*required, *(optional or {})])
            raise InputError(f"{path}: this kind of task has no field {key!r}; it has {known}")
        if not isinstance(value, kind):
            raise InputError(f"{path}: {key} must be {kind.__name__}, not {value!r}")
        if key in ("prompt", "reference", "answer", "tests"):
            try:
                list(Formatter().parse(str(value)))
            except ValueError as error:
                raise InputError(f"{path}: {key} has a brace that is no field: write {{{{ and }}}} ({error})") from None
    return found


def read_rows(path: Path, make: Callable[[dict[str, Any]], Made], wanted: str) -> list[Made]:
    """What `make` makes of every row of a .jsonl file. Raises InputError naming the line, the fault and what was
    `wanted`."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--data: {path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(make(json.loads(line)))
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not {wanted} ({type(error).__name__}: {error})") from None
    if not found:
        raise InputError(f"{path} holds no question")
    return found


def split_shots(asked: Sequence[Made], shots: int, limit: int | None) -> tuple[list[Made], list[Made]]:
    """The questions to ask, the first `limit` of them, and the `shots` solved ones from the end."""
    if not 0 <= shots < len(asked):
        raise InputError(f"--shots {shots} of {len(asked)} questions leaves none to ask, or is below 0")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: at least 1")
    cut = len(asked) - shots
    return list(asked[:cut][:limit]), list(asked[cut:])
