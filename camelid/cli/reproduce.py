"""Make a folder again from what its manifest says, and compare it bit for bit. What is there is not touched."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a corpus, tokenizer, tokens, model or evaluation folder, or a run")
    settings.example(parser, "camelid reproduce out/tokens")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from camelid.artifact import MANIFEST
    from camelid.errors import ChecksFailed
    from camelid.formats.load import resolve
    from camelid.reproduce import reproduce

    folder = Path(options.folder)
    result = reproduce(folder if (folder / MANIFEST).exists() else resolve(folder))
    if not options.json:
        for file in result["files"]:
            print(f"{'same' if file['same'] else 'OTHER':<5} {file['name']}")
        for what in ("settings", "versions"):
            for name, (then, now) in result[what].items():
                print(f"{what}: {name} was {then}, is {now}")
    if not result["ok"]:
        other = sum(not file["same"] for file in result["files"])
        raise ChecksFailed(f"{result['folder']}: {other} of {len(result['files'])} files came out otherwise", result)
    return result
