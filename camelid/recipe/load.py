"""A recipe's file, and what a command line changes of it; errors name the key, its line and the nearest valid key."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from datetime import date, time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from camelid.errors import InputError, RecipeError
from camelid.recipe.sections import LENGTHS, SIZES, Recipe


def find(path: str | Path) -> Path:
    """A recipe's file: the one at `path`, else the one of that name that comes with camelid (`small`, or
    `recipes/small.toml` anywhere)."""
    given, ours = Path(path), _recipes()
    if given.exists() or ours is None or given.parent.name not in ("", "recipes"):
        return given
    packaged = ours / f"{given.name.removesuffix('.toml')}.toml"
    return packaged if packaged.is_file() else given


def _recipes() -> Path | None:
    """The folder of recipes: within an installed package, beside it in a checkout."""
    places = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes")
    return next((place for place in places if (place / "small.toml").is_file()), None)


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides (all there is without a path).

    Raises RecipeError naming key, line and fix.
    """
    file = find(path) if path is not None else None
    try:
        text = file.read_text(encoding="utf-8-sig") if file else ""
        raw = tomllib.loads(text)
    except FileNotFoundError:
        ours = ", ".join(sorted(p.stem for p in (_recipes() or Path()).glob("*.toml")))
        raise InputError(f"no recipe at {path}: no such file, and none that comes with camelid ({ours})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; a recipe is a .toml file") from None
    given = [_override(raw, override) for override in overrides]
    if any(f"train.{name}" in given for name in LENGTHS):  # what the file says of it is replaced
        raw["train"] = {k: v for k, v in raw["train"].items() if k not in LENGTHS or f"train.{k}" in given}
    if "data.held_out" in given and not raw["data"]["held_out"]:  # then nothing is there to measure along the way
        raw["evaluate"] = {
            k: v for k, v in raw.get("evaluate", {}).items() if k != "every" or "evaluate.every" in given
        }
    if "model.size" in given:  # so is the file's width and depth
        raw["model"] = {k: v for k, v in raw["model"].items() if k not in SIZES or f"model.{k}" in given}
    recipe = parse(raw, str(path) if path is not None else "settings", text, given)
    recipe.train.check_heeded(given)
    if recipe.finetune:
        replaced = {"finetune.method", "finetune.adapter"} & set(given)  # and with it what the file says of its own
        said = {key.removeprefix("finetune.") for key in given} if replaced else recipe.finetune.model_fields_set
        recipe.finetune.check_heeded(said)
    return recipe


def parse(raw: dict[str, Any], name: str = "recipe", text: str = "", given: Sequence[str] = ()) -> Recipe:
    """Check a recipe that was already read. `text` is its source, for line numbers; `given` are keys from elsewhere."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(_explain(first, name, text, given)) from None


def _override(raw: dict[str, Any], override: str) -> str:
    """Put a setting into the recipe. Returns its key."""
    key, equals, value = override.partition("=")
    *sections, field = key.split(".")
    if not equals or not sections or not field:
        raise RecipeError(f"{override!r} is not a setting; write section.key=value, such as train.steps=400")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string: log.out=runs/b
    if isinstance(parsed, date | time):  # no key is a date; a name may look like one
        parsed = value
    inner = raw
    for section in sections:
        inner = inner.setdefault(section, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{override!r}: {section} is a value, not a section")
    inner[field] = parsed
    return key


def _explain(error: Any, name: str, text: str, given: Sequence[str]) -> str:
    path = [str(part) for part in error["loc"]]
    if path[1:2] != ["sources"]:
        path = path[:2]  # below a key there are only the kinds that it may be
    key = ".".join(path)
    line = None if any(f"{one}.".startswith(f"{key}.") for one in given) else _line_of(path, text)
    where = f"{name}, line {line}" if line else name
    if error["type"] != "extra_forbidden":
        if isinstance(error["input"], dict):
            of = f"{where}: {key}" if key else where
            return f"{of}: {error['msg'].removeprefix('Value error, ')}"
        told = error["msg"].removeprefix("Value error, ")  # ours as it is
        return f"{where}: {key} is {error['input']!r}: {told if told != error['msg'] else told.lower()}"
    section: Any = Recipe
    for part in path[:-1]:
        if part.isdigit():  # an entry of a list of sections
            continue
        annotation = section.model_fields[part].annotation
        section = next((a for a in getattr(annotation, "__args__", [annotation]) if a is not type(None)), annotation)
    known = [field.alias or name for name, field in section.model_fields.items()]
    near = difflib.get_close_matches(path[-1], known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
    return f"{where}: unknown key {key!r}; {hint}"


def _line_of(path: Sequence[str], text: str) -> int | None:
    """The line of a key in TOML source, by its section header; of one that is not there, its entry's in a list."""
    wanted, section, entry = ".".join(path), "", None
    met: Counter[str] = Counter()
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*(\[\[?)\s*([^\]]+?)\s*\]", line):
            section = header[2]
            if header[1] == "[[":
                met[section] += 1
                section = f"{section}.{met[section] - 1}"
            if section == wanted:
                return number
        elif key := re.match(r"\s*([\w.-]+)\s*=", line):
            full = f"{section}.{key[1]}" if section else key[1]
            if full == wanted:
                return number
        else:
            continue
        if wanted.startswith(f"{section}." if header else f"{full}.") and len(path) > 2:
            entry = number
    return entry
