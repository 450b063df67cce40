"""Locality-sensitive hashing of MinHash signatures: 21 bands of 6 rows.

Two documents of Jaccard similarity s share a band with probability 1 - (1 - s^6)^21: 0.93 at 0.7, 0.998 at 0.8,
0.999999 at 0.9. (14 bands of 8, FineWeb's choice, give 0.56 at 0.7.) A shared band makes a pair a candidate;
candidates are then compared exactly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BANDS, ROWS = 21, 6
_PRIME = np.uint64(0x9FB21C651E98DF25)


def expected_recall(similarity: float) -> float:
    """The share of pairs of this Jaccard similarity that become candidates."""
    return float(1 - (1 - similarity**ROWS) ** BANDS)


def band_keys(signatures: NDArray[np.uint32], sizes: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One key a band, uint64 [documents, BANDS], never 0; all 0 for a document without shingles."""
    keys = np.zeros((len(signatures), BANDS), dtype=np.uint64)
    for band in range(BANDS):
        key = np.full(len(signatures), band + 1, dtype=np.uint64)
        for row in range(band * ROWS, (band + 1) * ROWS):
            key = (key ^ signatures[:, row].astype(np.uint64)) * _PRIME
            key ^= key >> np.uint64(29)
        keys[:, band] = np.where(sizes > 0, np.maximum(key, np.uint64(1)), np.uint64(0))
    return keys


def candidates(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Pairs (earlier, later) that share a key: int64 [pairs, 2].

    In a bucket every document is paired with the first and with the one before it: enough to join what belongs
    together, without the square of a large bucket.
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same = (ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)
    later = np.flatnonzero(same) + 1
    if not len(later):
        return np.empty((0, 2), dtype=np.int64)
    begins = np.where(np.concatenate(([True], ~same)), np.arange(len(ordered)), 0)
    first = np.maximum.accumulate(begins)
    pairs = np.concatenate(
        (np.stack((order[first[later]], order[later]), 1), np.stack((order[later - 1], order[later]), 1))
    )
    pairs.sort(axis=1)
    unique: NDArray[np.int64] = np.unique(pairs.astype(np.int64), axis=0)
    return unique


def clusters(pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Connected components of verified pairs: rows (member, its cluster's smallest member) for every other member."""
    parent: dict[int, int] = {}

    def root(x: int) -> int:
        while (up := parent.setdefault(x, x)) != x:
            parent[x] = parent[up]
            x = up
        return x

    for a, b in pairs.tolist():
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    members = [(x, root(x)) for x in sorted(parent)]
    return np.array([m for m in members if m[0] != m[1]], dtype=np.int64).reshape(-1, 2)
