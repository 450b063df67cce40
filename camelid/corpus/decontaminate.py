"""Keep evaluation sets out of training text: a document that shares a sequence of words with one is dropped.

Thirteen words in a row, as GPT-3 did (arXiv:2005.14165, appendix C); words as in `shingles`, so that Chinese counts
characters. A sequence counts only where the set spells it in one place of one record.
"""

from __future__ import annotations

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


def record(files: Sequence[str]) -> list[dict[str, str]]:
    """What the manifest says: which sets were checked, by content."""
    return [{"name": Path(f).name, "sha256": sha256_file(Path(f).expanduser())} for f in files]


def unchecked(model: Path, files: Sequence[Path]) -> str | None:
    """A warning when a model's corpora were not checked against these evaluation files; None when they were, or when
    where the model came from is not known."""
    if not (model / MANIFEST).is_file():
        return None
    corpora = _corpora(lineage(model))
    digests = {sha256_file(path) for path in files}
    for corpus in corpora:
        if not digests <= {entry["sha256"] for entry in read_manifest(corpus).get("decontaminated", [])}:
            return (
                f"the corpus {corpus} was not decontaminated against this text: if it holds parts of it, the figures "
                "flatter the model (corpus build … decontaminate=FILE)"
            )
    return None


def _corpora(node: dict[str, Any]) -> list[Path]:
    own = [Path(node["path"])] if node["kind"] == "corpus" and (Path(node["path"]) / MANIFEST).is_file() else []
    return own + [path for child in node["inputs"] for path in _corpora(child)]
