"""Keep evaluation sets out of training text: a document that shares a sequence of words with one is dropped.

Thirteen words in a row, as GPT-3 did (arXiv:2005.14165, appendix C); words as in `shingles`, so that Chinese counts
characters. A sequence counts only where the set spells it in one place of one record.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camelid.artifact import MANIFEST, lineage, read_manifest
from camelid.corpus.bytestream import Break, pieces
from camelid.corpus.read import format_of, read
from camelid.corpus.shingles import sequences
from camelid.disk import sha256_file
from camelid.errors import InputError

SEQUENCE_WORDS = 13


@dataclass(frozen=True)
class EvaluationSets:
    """The sorted sequence hashes of all sets, and for each hash which set it came from."""

    names: list[str]
    hashes: NDArray[np.uint64]
    owners: NDArray[np.int32]

    def contaminated(self, texts: Sequence[str]) -> list[str | None]:
        """For every text the set it shares a sequence with, or None."""
        if not len(self.hashes):
            return [None] * len(texts)
        found, offsets = sequences(texts, SEQUENCE_WORDS)
        at = np.minimum(np.searchsorted(self.hashes, found), len(self.hashes) - 1)
        hits = np.flatnonzero(self.hashes[at] == found)
        answers: list[str | None] = [None] * len(texts)
        for text, hit in zip(np.searchsorted(offsets, hits, side="right") - 1, hits, strict=True):
            answers[text] = answers[text] or self.names[self.owners[at[hit]]]
        return answers


def load(files: Sequence[str]) -> EvaluationSets:
    """Read evaluation sets: any file that the corpus reads; of a JSON record every string counts.

    Raises InputError for a missing file or one that yields nothing to compare.
    """
    names, parts = [], []
    for number, name in enumerate(files):
        path = Path(name).expanduser()
        if not path.is_file():
            raise InputError(f"corpus.decontaminate: {name} is not a file")
        hashes, _ = sequences(_texts(path), SEQUENCE_WORDS)
        if not len(hashes):
            raise InputError(f"corpus.decontaminate: {name} holds no text of {SEQUENCE_WORDS} words to compare with")
        names.append(path.name)
        unique = np.unique(hashes)
        parts.append((unique, np.full(len(unique), number, dtype=np.int32)))
    if not parts:
        return EvaluationSets([], np.empty(0, np.uint64), np.empty(0, np.int32))
    hashes = np.concatenate([p[0] for p in parts])
    order = np.argsort(hashes, kind="stable")
    return EvaluationSets(names, hashes[order], np.concatenate([p[1] for p in parts])[order])


def _texts(path: Path) -> list[str]:
    import json

    if format_of(path) not in ("jsonl", "json"):
        return [d.text for d in read(path) if not d.fault and not d.skip]
    parts = list(pieces(path))
    if any(isinstance(part, Break) for part in parts):
        raise InputError(f"corpus.decontaminate: {path} is damaged: it cannot be unpacked")
    raw = b"".join(part for part in parts if isinstance(part, bytes)).decode("utf-8-sig", "replace")
    try:
        lines = raw.split("\n") if format_of(path) == "jsonl" else [raw]
        return [text for line in lines if line.strip() for text in _strings(json.loads(line))]
    except (ValueError, RecursionError) as error:
        raise InputError(f"corpus.decontaminate: {path} is not JSON: {error}") from None


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in inside for text in _strings(item)]


def record(files: Sequence[str]) -> list[dict[str, Any]]:
    """What the manifest says: which sets were checked, by content, and how many of their texts are shorter than what is
    looked for."""
    found = []
    for path in (Path(name).expanduser() for name in files):
        texts = _texts(path)
        _, offsets = sequences(texts, SEQUENCE_WORDS)
        short = int((np.diff(offsets) == 0).sum())
        found.append({"name": path.name, "sha256": sha256_file(path), "texts": len(texts), "too_short": short})
    return found


def unchecked(model: Path, files: Sequence[Path]) -> str | None:
    """A warning when a model's corpora were not checked against these evaluation files; None when they were, or when
    where the model came from is not known."""
    if not (model / MANIFEST).is_file():
        return None
    digests = {sha256_file(path) for path in files}
    for corpus, changed in _corpora(lineage(model)):
        if changed:
            return (
                f"the corpus {corpus} is not the one that the model was trained on: whether that one held parts of "
                "this text is not known"
            )
        if not digests <= {entry["sha256"] for entry in read_manifest(corpus).get("decontaminated", [])}:
            return (
                f"the corpus {corpus} was not decontaminated against this text: if it holds parts of it, the figures "
                "flatter the model (corpus build … decontaminate=FILE)"
            )
    return None


def _corpora(node: dict[str, Any], changed: bool = False) -> list[tuple[Path, bool]]:
    """The corpora that a folder came from, and whether one of them, or what was made of it, is another by now."""
    changed = changed or bool(node.get("changed"))
    if node["kind"] == "corpus":
        path = Path(node["path"])
        return [(path, changed)] if os.path.exists(path / MANIFEST) else []
    return [found for child in node["inputs"] for found in _corpora(child, changed)]
