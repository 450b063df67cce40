"""Documents into rows of equal length: nothing is thrown away, and hardly anything is padded.

What is packed are predictions: a document of n tokens has n - 1 of them, each from a token to the next. A document
longer than a row is cut into pieces, of which each begins with the token that the one before predicted last, so every
token is predicted exactly once. Best-fit decreasing: the longest piece first, into the fullest row that has room.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Piece i predicts `sizes[i]` tokens from token `firsts[i]` on; pieces rows[r] … rows[r + 1] stand in row r."""

    firsts: Ints
    sizes: Ints
    rows: Ints

    def __len__(self) -> int:
        return len(self.rows) - 1


def pack(starts: Ints, length: int) -> Packing:
    """Rows of `length` predictions. `starts`: where each document begins in the token stream, and its end."""
    firsts, sizes = _pieces(starts, length)
    row = best_fit(sizes, length)
    order = np.argsort(row, kind="stable")
    count = int(row.max()) + 1 if len(row) else 0
    return Packing(firsts[order], sizes[order], np.searchsorted(row[order], np.arange(count + 1)).astype(np.int64))


def _pieces(starts: Ints, length: int) -> tuple[Ints, Ints]:
    predictions = np.maximum(np.diff(starts) - 1, 0)
    counts = -(-predictions // length)
    document = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    sizes = np.minimum(length, predictions[document] - number * length)
    return starts[:-1][document] + number * length, sizes


def best_fit(sizes: Ints, length: int) -> Ints:
    """The row of every piece; no row holds more than `length`."""
    rows = np.empty(len(sizes), dtype=np.int64)
    full = np.flatnonzero(sizes == length)
    rows[full] = np.arange(len(full))
    used = len(full)
    rest = np.flatnonzero(sizes < length)
    room: list[list[int]] = [[] for _ in range(length)]  # rows by how much still fits
    open_rooms = 0  # bit s: some row has room for exactly s
    for piece in rest[np.argsort(-sizes[rest], kind="stable")].tolist():
        size = int(sizes[piece])
        enough = open_rooms >> size
        if enough:
            space = size + (enough & -enough).bit_length() - 1
            row = room[space].pop()
            if not room[space]:
                open_rooms ^= 1 << space
        else:
            row, space, used = used, length, used + 1
        rows[piece] = row
        if left := space - size:
            room[left].append(row)
            open_rooms |= 1 << left
    return rows
