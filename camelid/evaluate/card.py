"""A model card made from records only: what the manifests of the model, its run and its evaluations say, each number
with its protocol. Nothing in it is written by hand; what no record says is not there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from camelid.artifact import MANIFEST, identity, lineage, read_manifest
from camelid.disk import new_file
from camelid.errors import InputError
from camelid.evaluate.record import numbers, read
from camelid.formats.load import open_model, resolve

MARK = "Made by `camelid evaluate card`"


def write(out: Path, text: str) -> None:
    """Write a card. Raises InputError for a file that is none: it may be somebody's work."""
    if out.exists() and not (out.is_file() and MARK in out.read_text(encoding="utf-8", errors="replace")):
        raise InputError(f"{out} exists and is no card that camelid made: choose another --out, or remove it")
    new_file(out, [text.encode()])


def card(model: str, evaluations: Sequence[Path]) -> str:
    """The card as Markdown, with the front matter that model hubs read. Raises InputError for an evaluation of another
    model."""
    path = resolve(model)
    config = open_model(model).config
    manifest = read_manifest(path) if (path / MANIFEST).is_file() else None
    parts = [
        "---",
        "library_name: camelid",
        "tags: [llama]",
        "---",
        f"# {path.parent.parent.name if path.parent.name == 'checkpoints' else path.stem}",
        "",
    ]
    parts += [f"{MARK} from records; every figure is one that a run wrote down.", ""]
    parts += ["## The model", "", "| field | value |", "|---|---|"]
    shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size", "max_position_embeddings", "tie_word_embeddings")  # fmt: skip
    known = config.to_dict()
    parts += [f"| parameters | {config.num_parameters():,} |", *(f"| {k} | {known[k]} |" for k in shape if k in known)]
    if manifest:
        parts += _training(path, manifest)
    parts += _evaluations(path, evaluations)
    return "\n".join(parts) + "\n"


def _training(path: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", "## How it was made", "", f"{manifest['made']}, by camelid {manifest['versions']['camelid']}.", "")
    settings = {k: v for k, v in manifest.get("settings", {}).items() if v}
    if settings:
        yield from ("```json", json.dumps(settings, indent=1, ensure_ascii=False), "```", "")
    yield from ("| made from | what | SHA-256 |", "|---|---|---|")
    for node, depth in _walk(lineage(path)["inputs"]):
        name = "&nbsp;" * 4 * depth + Path(node["path"]).name
        changed = " (changed since)" if node.get("changed") else ""
        yield f"| {name} | {node['kind']} | {str(node.get('sha256', ''))[:16]}{changed} |"


def _walk(nodes: Sequence[Mapping[str, Any]], depth: int = 0) -> Iterator[tuple[Mapping[str, Any], int]]:
    for node in nodes:
        yield node, depth
        yield from _walk(node["inputs"], depth + 1)


def _evaluations(path: Path, folders: Sequence[Path]) -> Iterator[str]:
    if not folders:
        return
    own = identity(path)
    yield from ("", "## What it was measured to do", "", "| measure | figure | value |", "|---|---|---|")
    notes = []
    for number, folder in enumerate(folders, 1):
        manifest, _ = read(folder)
        if manifest["measured"]["sha256"] != own:
            raise InputError(f"{folder} measured another model than {path}, or other weights of it: measure this one")
        for name, value in numbers(manifest["figures"]):
            yield f"| {manifest['measure']} [{number}] | {name} | {value} |"
        data = ", ".join(f"{d['name']} {d['sha256'][:16]}" for d in manifest["data"])
        notes.append(f"{number}. {manifest['figures']['protocol']}. Data: {data}. {manifest['made']}.")
    yield from ("", *notes)
