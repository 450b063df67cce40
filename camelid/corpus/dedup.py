"""Documents that say the same: exact copies, near copies (MinHash), and lines seen in an earlier document (CCNet).

Works on the arrays that the units left on disk, a bounded slice at a time; every result is a file, so an interrupted
run goes on where it stopped. Of a group the first document in reading order stays. A document's id is its row counted
over all units.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camelid.corpus import minhash
from camelid.corpus.shingles import common
from camelid.disk import write_array

SLICE = 4_000_000  # keys held at once
PAIRS_AT_ONCE = 50_000


@dataclass(frozen=True)
class Store:
    """The units' folders and how many documents each holds."""

    work: Path
    folders: tuple[str, ...]
    counts: tuple[int, ...]

    @property
    def starts(self) -> NDArray[np.int64]:
        """The id of each unit's first document, and one past the last: int64 [units + 1]."""
        return np.concatenate(([0], np.cumsum(self.counts))).astype(np.int64)

    def arrays(self, name: str) -> Iterator[NDArray[Any]]:
        """An array of every unit that has documents, memory-mapped."""
        for folder, count in zip(self.folders, self.counts, strict=True):
            if count:
                yield np.load(self.work / folder / f"{name}.npy", mmap_mode="r")


def save(path: Path, array: NDArray[Any]) -> None:
    """Write an array in one step, bytes before name."""
    part = path.with_suffix(f".{os.getpid()}.part")
    write_array(part, array)
    part.replace(path)


def _passes(total: int) -> Iterator[tuple[int, int]]:
    """Ranges of the upper 16 bits of a key, so that one range's share of `total` keys fits a slice."""
    parts = max(1, -(-total // SLICE))
    edges = [65536 * i // parts for i in range(parts + 1)]
    return itertools.pairwise(edges)


def _select(arrays: Iterable[NDArray[np.uint64]], low: int, high: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Keys (or rows that begin with a key) whose upper bits lie in [low, high), and the ids of their documents."""
    keys, ids, start = [], [], 0
    for array in arrays:
        upper = (array if array.ndim == 1 else array[:, 0]) >> np.uint64(48)
        at = np.flatnonzero((upper >= low) & (upper < high))
        keys.append(np.asarray(array[at]))
        ids.append(at + start)
        start += len(array)
    return (np.concatenate(keys), np.concatenate(ids)) if keys else (np.empty(0, np.uint64), np.empty(0, np.int64))


def exact_copies(store: Store) -> NDArray[np.int64]:
    """Rows (copy, first document with the same text), in order of the copy."""
    found = []
    for low, high in _passes(sum(store.counts)):
        digests, ids = _select(store.arrays("exact"), low, high)
        first_half, second_half = digests.reshape(-1, 2).T
        order = np.lexsort((ids, second_half, first_half))
        a, b, ids = first_half[order], second_half[order], ids[order]
        same = (a[1:] == a[:-1]) & (b[1:] == b[:-1])
        leader = np.maximum.accumulate(np.where(np.concatenate(([True], ~same)), np.arange(len(ids)), 0))
        copies = np.flatnonzero(same) + 1
        found.append(np.stack((ids[copies], ids[leader[copies]]), 1))
    return _by_first(found)


def _by_first(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    rows = np.concatenate(parts) if parts else np.empty((0, 2), np.int64)
    return rows[np.argsort(rows[:, 0], kind="stable")]


def band_candidates(store: Store, band: int, out: Path) -> None:
    """Candidate pairs of one band, in a file."""
    if out.exists():
        return
    found = []
    for low, high in _passes(sum(store.counts)):
        keys, ids = _select((a[band] for a in store.arrays("bands")), low, high)
        pairs = minhash.candidates(keys)
        found.append(ids[pairs] if len(pairs) else np.empty((0, 2), np.int64))
    save(out, np.concatenate(found))


def merge_candidates(files: Sequence[Path], copies: NDArray[np.int64], out: Path) -> int:
    """All bands' pairs, each once, without those of exact copies (they are gone already). Returns how many."""
    if not out.exists():
        pairs = np.unique(np.concatenate([np.load(f) for f in files]), axis=0)
        gone = np.isin(pairs, copies[:, 0]).any(axis=1)
        save(out, pairs[~gone])
    return len(np.load(out, mmap_mode="r"))


class _Shingles:
    """The shingle sets of any document."""

    def __init__(self, store: Store) -> None:
        self._store, self._starts = store, store.starts
        self._open: dict[int, tuple[NDArray[np.uint32], NDArray[np.int64]]] = {}

    def __call__(self, document: int) -> NDArray[np.uint32]:
        unit = int(np.searchsorted(self._starts, document, side="right")) - 1
        hashes, offsets = self._arrays(unit)
        row = document - int(self._starts[unit])
        return hashes[offsets[row] : offsets[row + 1]]

    def _arrays(self, unit: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        if unit not in self._open:
            folder = self._store.work / self._store.folders[unit]
            hashes = np.load(folder / "shingles.npy", mmap_mode="r")
            self._open[unit] = np.asarray(hashes), np.load(folder / "shingle_offsets.npy")
        return self._open[unit]


def verify(store: Store, pairs_file: Path, start: int, threshold: float, out: Path) -> None:
    """Of the pairs from `start` on, those whose shingle sets have at least this Jaccard similarity, in a file."""
    if out.exists():
        return
    pairs = np.load(pairs_file, mmap_mode="r")[start : start + PAIRS_AT_ONCE]
    shingles = _Shingles(store)
    left = [shingles(a) for a in pairs[:, 0].tolist()]
    right = [shingles(b) for b in pairs[:, 1].tolist()]
    shared = common(left, right)
    union = np.array([len(x) + len(y) for x, y in zip(left, right, strict=True)], dtype=np.int64) - shared
    save(out, np.asarray(pairs[shared >= threshold * union]))


def repeated_lines(store: Store, dropped: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of lines that several documents have, sorted, and the first document of each. Those `dropped` are none."""
    keys_found, first_found = [], []
    total = sum(len(a) for a in store.arrays("lines"))
    for low, high in _passes(total):
        keys, ids = _select_lines(store, low, high)
        stays = ~np.isin(ids, dropped)
        keys, ids = keys[stays], ids[stays]
        order = np.lexsort((ids, keys))
        keys, ids = keys[order], ids[order]
        begins = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1]))) if len(keys) else np.empty(0, np.int64)
        ends = np.concatenate((begins[1:], [len(keys)])).astype(np.int64)
        several = ids[begins] != ids[ends - 1] if len(keys) else np.empty(0, bool)
        keys_found.append(keys[begins[several]] if len(keys) else keys)
        first_found.append(ids[begins[several]] if len(keys) else ids)
    return np.concatenate(keys_found), np.concatenate(first_found)


def _select_lines(store: Store, low: int, high: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    keys, ids = [], []
    starts = store.starts[[i for i, n in enumerate(store.counts) if n]]
    for start, lines, offsets in zip(starts, store.arrays("lines"), store.arrays("line_offsets"), strict=True):
        upper = lines >> np.uint64(48)
        at = np.flatnonzero((upper >= low) & (upper < high) & (lines != 0))
        keys.append(np.asarray(lines[at]))
        ids.append(np.searchsorted(offsets, at, side="right") - 1 + start)
    return (np.concatenate(keys), np.concatenate(ids)) if keys else (np.empty(0, np.uint64), np.empty(0, np.int64))
