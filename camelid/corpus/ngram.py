"""A small character n-gram model, for CCNet's idea (arXiv:1911.00359): text unlike the reference is dropped.

Six characters predict the next with stupid backoff (Brants et al. 2007) over hashed counts; its figure is a perplexity
only in name, good for ranking texts. It reads any script.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from camelid.corpus.clean import texts_of
from camelid.corpus.repair import repair
from camelid.disk import settle
from camelid.errors import InputError

ORDER, BUCKETS, BACKOFF = 6, 1 << 22, 0.4
SAMPLE = 20_000  # characters of a text that are scored
_PRIME = np.uint64(0x9E3779B97F4A7C15)


def _grams(text: str, order: int) -> NDArray[np.int64]:
    """The bucket of the `order` characters that end at every position from order - 1 on."""
    points = np.frombuffer(text.encode("utf-32-le", "replace"), dtype=np.uint32).astype(np.uint64)
    if len(points) < order:
        return np.empty(0, np.int64)
    h = np.full(len(points) - order + 1, order, dtype=np.uint64)
    for k in range(order):
        h = (h ^ points[k : len(points) - order + 1 + k]) * _PRIME
        h ^= h >> np.uint64(31)
    return (h % np.uint64(BUCKETS)).astype(np.int64)


@dataclass(frozen=True)
class NgramModel:
    """Counts of n-grams: int32 [ORDER, BUCKETS]; a text of a perplexity above `limit` is unlike the reference."""

    counts: NDArray[np.int32]
    limit: float

    @classmethod
    def load(cls, path: Path) -> NgramModel:
        with np.load(path) as saved:
            return cls(saved["counts"], float(saved["limit"]))

    def perplexities(self, texts: Sequence[str]) -> list[float]:
        """exp(mean -ln p(character)) of each text."""
        return [self._perplexity(" ".join(text[:SAMPLE].split())) for text in texts]

    def _perplexity(self, text: str) -> float:
        if len(text) < ORDER:
            return 1.0  # too short to judge
        total = self.counts[0].sum()
        last = _grams(text, 1)[ORDER - 1 :]
        probability = (self.counts[0][last] + 0.5) / (total + 0.5 * BUCKETS) * BACKOFF ** (ORDER - 1)
        for order in range(2, ORDER + 1):
            whole = self.counts[order - 1][_grams(text, order)[ORDER - order :]]
            before = self.counts[order - 2][_grams(text, order - 1)[ORDER - order : -1]]
            seen = (whole > 0) & (before > 0)
            probability = np.where(seen, whole / np.maximum(before, 1) * BACKOFF ** (ORDER - order), probability)
        return float(np.exp(-np.log(np.minimum(probability, 1.0)).mean()))


def train_on_files(files: Sequence[str], out: Path, quantile: float) -> None:
    """Count the reference files; the limit is this quantile of the reference's own documents, scored on the half that
    was not counted. Nothing to do when `out` exists. Raises InputError for too little text."""
    if out.exists():
        return
    texts = (repair(text) for text in texts_of(files))
    pieces = [" ".join(text[i : i + SAMPLE].split()) for text in texts for i in range(0, len(text), SAMPLE)]
    if len(pieces) < 4:
        raise InputError(
            f"corpus.perplexity_reference: {len(pieces)} pieces of text are too few, give {4 * SAMPLE} characters"
        )
    counts = np.zeros((ORDER, BUCKETS), dtype=np.int32)
    for piece in pieces[::2]:
        for order in range(1, ORDER + 1):
            np.add.at(counts[order - 1], _grams(piece, order), 1)
    held_out = NgramModel(counts, float("inf")).perplexities(pieces[1::2])
    part = out.with_suffix(".part.npz")
    np.savez_compressed(part, counts=counts, limit=np.quantile(held_out, quantile))
    settle(part)
    part.replace(out)
