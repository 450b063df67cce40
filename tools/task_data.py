"""Training material for the task recipes from real text that pip brings: `python tools/task_data.py translation`.

translation: Django's own message catalogs (BSD-3-Clause), English to a language, from its wheel.
summary: docstrings of the installed packages: the body, to its first line.
code: documented functions of the standard library: signature and docstring, to the body (dedented).

Prints where the file lies, in .cache/. Every text stands once, so what a run holds out it never learned from.
"""

from __future__ import annotations

import argparse
import ast
import gettext
import io
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache"
DJANGO = "django==5.2.19"
NAMES = {"de": "German", "es": "Spanish", "fr": "French", "it": "Italian", "ja": "Japanese", "zh_Hans": "Chinese"}
MOST = 6000
SKIPPED = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}

Row = dict[str, str]


def translation(language: str) -> Iterator[Row]:
    """English messages and their translations, without those that hold markup or placeholders."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, DJANGO]
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            sys.exit(f"pip could not download {DJANGO}: check the network, then try again")
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            for name in sorted(wheel.namelist()):
                if name.endswith(f"/locale/{language}/LC_MESSAGES/django.mo"):
                    catalog = gettext.GNUTranslations(io.BytesIO(wheel.read(name)))
                    messages: dict[object, str] = vars(catalog)["_catalog"]
                    for english, other in messages.items():
                        text = english.rpartition("\x04")[2] if isinstance(english, str) else ""
                        if text and other and not re.search(r"[%<{]", text + other):
                            yield {"prompt": f"Translate into {NAMES[language]}: {text}", "completion": other}


def functions(root: Path) -> Iterator[tuple[ast.FunctionDef, str]]:
    """Documented functions under a folder, with their source."""
    for path in sorted(root.rglob("*.py")):
        if SKIPPED & set(path.relative_to(root).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("__") and ast.get_docstring(node):
                yield node, text


def summary() -> Iterator[Row]:
    """The body of a docstring, two to twelve lines of prose, and its first line."""
    for node, _ in functions(Path(sysconfig.get_paths()["purelib"])):
        first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
        prose = " ".join(rest.partition("\n\n")[0].split())
        line = " ".join(first.split())
        if 5 <= len(line.split()) <= 20 and 20 <= len(prose.split()) <= 120 and not re.search(r"[:>|=`*]{2}", prose):
            yield {"prompt": f"Summarize in one line what this does: {prose}", "completion": line}


def code() -> Iterator[Row]:
    """A signature with its docstring, and the lines that follow."""
    for node, text in functions(Path(sysconfig.get_paths()["stdlib"])):
        lines = text.split("\n")
        if len(node.body) < 2 or (node.end_lineno or 0) - node.body[1].lineno > 12:
            continue
        head = "\n".join(lines[node.lineno - 1 : node.body[1].lineno - 1])
        body = textwrap.dedent("\n".join(lines[node.body[1].lineno - 1 : node.end_lineno]))
        if len(head) < 600:
            yield {
                "prompt": f"Write the body of this Python function, without its indentation:\n{head}",
                "completion": body,
            }


def main() -> None:
    """Write one task's file and print its path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("translation", "summary", "code"))
    parser.add_argument("--language", choices=sorted(NAMES), default="fr", help="of translation")
    options = parser.parse_args()
    name = f"translation-{options.language}" if options.task == "translation" else options.task
    made = {"translation": lambda: translation(options.language), "summary": summary, "code": code}
    known: set[str] = set()
    CACHE.mkdir(exist_ok=True)
    path = CACHE / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in made[options.task]():
            keys = {row["prompt"].lower(), row["completion"].lower()}
            if not keys & known and len(known) < 2 * MOST:
                print(json.dumps(row, ensure_ascii=False), file=file)
            known |= keys
    print(path)


if __name__ == "__main__":
    main()
