"""Write docs/reference.md from what the code says of itself: verbs and options, keys of recipes, Python names.

`reference.py` writes it, `reference.py --check` fails when it is not what the code says (a test runs that).
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import camelid
from camelid import cli, recipe
from camelid.recipe import sections

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
# What a Python user meets beyond the names of `camelid` itself.
MORE = {
    "camelid.auto": ["CausalLM"],
    "camelid.generate.engine": ["Result"],
    "camelid.generate.constrain": ["Form"],
    "camelid.notebook": ["show_model", "show_tokens", "show_probabilities", "show_run"],
    "camelid.formats.convert": ["convert"],
    "camelid.quantize.job": ["Wish", "quantize", "cost_of"],
    "camelid.artifact": ["lineage"],
    "camelid.errors": ["CamelidError", "InputError", "FormatError", "RecipeError", "ChecksFailed", "MissingExtra"],
}


def page() -> str:
    parts = ["# Reference", "Made from the code by `tools/reference.py`: do not edit."]
    parts += ["## Verbs", *(part for verb in cli.VERBS for part in verb_parts(verb))]
    parts += ["## Recipes", inspect.cleandoc(recipe.__doc__ or ""), *recipe_parts()]
    parts += ["## Python", *python_parts()]
    return "\n\n".join(parts) + "\n"


def cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(c) for c in line) + " |" for line in lines)


def verb_parts(verb: str) -> Iterator[str]:
    module, parser = cli.parser_of(verb)
    yield f"### {verb}"
    yield inspect.cleandoc(module.__doc__ or "")
    for name, leaf in cli.leaves(parser).items():
        rows = [row for action in leaf._actions if (row := option(action))]
        words = " ".join(
            filter(None, ["camelid", verb, name, *(str(row[0]) for row in rows if not str(row[0]).startswith("`-"))])
        )
        settings = " [key=value …]" if any(action.dest == "settings" for action in leaf._actions) else ""
        yield f"`{words.replace('`', '')}{settings}`"
        yield table(("option", "default", "meaning"), rows)


def option(action: argparse.Action) -> tuple[object, ...] | None:
    if isinstance(action, argparse._HelpAction | argparse._SubParsersAction) or action.dest in ("settings", "json"):
        return None
    names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    if action.option_strings and action.nargs != 0:
        names += f" {action.metavar or action.dest.upper()}"
    default = f"`{action.default}`" if cli.has_default(action) else ""
    chosen = f"one of {', '.join(map(str, action.choices))}" if action.choices else ""
    told = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    needed = "required" if action.option_strings and action.required else ""
    return f"`{names}`", default, "; ".join(filter(None, (told, chosen, needed)))


def recipe_parts() -> Iterator[str]:
    for name, field in recipe.Recipe.model_fields.items():
        section = section_of(field.annotation)
        yield f"### [{name}]"
        if section.__doc__ and section.__doc__ != sections._Section.__doc__:
            yield inspect.cleandoc(section.__doc__)
        yield table(("key", "kind", "default", "meaning"), list(keys(section)))
        if name == "corpus":
            yield "#### [[corpus.sources]]"
            yield inspect.cleandoc(recipe.SourceSection.__doc__ or "")
            yield table(("key", "kind", "default", "meaning"), list(keys(recipe.SourceSection)))


def section_of(annotation: Any) -> Any:
    return next((a for a in typing.get_args(annotation) if a is not type(None)), annotation)


def keys(section: Any) -> Iterator[tuple[object, ...]]:
    source = inspect.getsource(section)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    declared = dict(re.findall(r"^    (\w+): ([^=\n]+?)(?: = .*)?$", source, re.M))
    for name, field in section.model_fields.items():
        kind = declared[name].replace(" | None", "").partition("  #")[0]
        kind = re.sub(r"^Literal\[(.*)\]$", lambda m: m[1].replace(", ", " or "), kind)
        kind = re.sub(r"^Annotated\[(\w+), .*\]$", r"\1", kind).replace("Words", "list[str]")
        limits = [
            f"{SIGNS[s]} {getattr(m, s)}" for m in field.metadata for s in SIGNS if getattr(m, s, None) is not None
        ]
        default = "" if field.is_required() or field.default is None else f"`{toml(field.default)}`"
        told = "; ".join(filter(None, (comments.get(name, ""), ", ".join(limits))))
        yield f"`{field.alias or name}`", kind, default, told


SIGNS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value).replace("'", '"')


def python_parts() -> Iterator[str]:
    for name in camelid.__all__:
        yield from thing(f"camelid.{name}", getattr(camelid, name))
    for module, names in MORE.items():
        for name in names:
            yield from thing(f"{module}.{name}", getattr(import_module(module), name))


def thing(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, types.ModuleType):
        yield f"### {path}"
        yield inspect.cleandoc(value.__doc__ or "")
        for name in value.__all__:
            yield from thing(f"{path}.{name}", getattr(value, name))
        return
    yield f"### {path}"
    yield f"```text\n{signature(path.rpartition('.')[2], value)}\n```"
    yield doc(value)
    if inspect.isclass(value):
        for name, member in vars(value).items():
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
                yield f"`{signature(name, getattr(value, name), method=True)}`"
                yield doc(function)


def doc(value: Any) -> str:
    return inspect.cleandoc(inspect.getdoc(value) or "")


def signature(name: str, value: Any, method: bool = False) -> str:
    """As it is written, types as words."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    words: list[str] = []
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        if not (method and parameter.name == "self"):
            words.append(declared(parameter))
    returns = (
        "" if found.return_annotation in (found.empty, None, "None") else f" -> {written(found.return_annotation)}"
    )
    return f"{name}({', '.join(words)}){returns}"


def declared(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind = "" if parameter.annotation is parameter.empty else f": {written(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return f"{stars}{parameter.name}{kind}"
    plain = isinstance(parameter.default, str | int | float | bool | tuple | types.NoneType)
    default = repr(parameter.default).replace("'", '"') if plain else "…"
    return f"{parameter.name}{kind} = {default}"


def written(annotation: Any) -> str:
    return annotation.strip("'") if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def main() -> None:
    made = page()
    if "--check" in sys.argv[1:]:
        kept = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        sys.exit(0 if kept == made else f"{PAGE} is not what the code says: python tools/reference.py")
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
