"""Documents as sets of word shingles, and their MinHash signatures (Broder 1997).

A shingle is five words in a row, lower-cased, without punctuation; a character of a script without spaces is a word.
Hashes are the same in the native library and here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camelid.corpus.characters import DIGIT, LETTER, LIMIT, MARK, SOLID, char_class, lower_case
from camelid.corpus.statistics import tables
from camelid.kernels import text as native

SHINGLE_WORDS = 5
PERMUTATIONS = 128
_MASK = (1 << 64) - 1


def shingles(texts: Sequence[str], n: int = SHINGLE_WORDS) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Sorted distinct 32-bit hashes of each text's n-word shingles, end to end, and offsets int64 [texts + 1].

    A text of fewer than n words is one shingle, an empty one none.
    """
    if native.ready(tables):
        return native.shingles(native.pack(texts), n)
    sets = []
    for text in texts:
        hashes = _word_hashes(text)
        spans = [hashes[i : i + n] for i in range(max(1, len(hashes) - n + 1))] if hashes else []
        sets.append(np.unique(np.array([_joined(s) >> 32 for s in spans], dtype=np.uint32)))
    found, offsets = _end_to_end(sets)
    return found.astype(np.uint32), offsets


def sequences(texts: Sequence[str], n: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """64-bit hashes of each text's n-word sequences, in order, end to end, and offsets."""
    if native.ready(tables):
        return native.sequences(native.pack(texts), n)
    lists = []
    for text in texts:
        hashes = _word_hashes(text)
        found = [_joined(hashes[i : i + n]) for i in range(len(hashes) - n + 1)]
        lists.append(np.array(found, dtype=np.uint64))
    hashes_found, offsets = _end_to_end(lists)
    return hashes_found.astype(np.uint64), offsets


def _end_to_end(parts: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(p) for p in parts], out=offsets[1:])
    return np.concatenate(parts) if parts else np.empty(0), offsets


def signatures(hashes: NDArray[np.uint32], offsets: NDArray[np.int64]) -> NDArray[np.uint32]:
    """MinHash signatures of sets given end to end: uint32 [sets, PERMUTATIONS]; all ones for an empty set."""
    a, b = _coefficients()
    if native.ready(tables):
        return native.minhash(hashes, offsets, a, b)
    out = np.full((len(offsets) - 1, PERMUTATIONS), 0xFFFFFFFF, dtype=np.uint32)
    for i, (begin, end) in enumerate(itertools.pairwise(offsets)):
        for start in range(begin, end, 4096):  # bounds the [shingles, permutations] table
            part = hashes[start : min(start + 4096, end), None]
            np.minimum(out[i], (part * a + b).min(axis=0), out=out[i])
    return out


@cache
def _coefficients() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Odd multipliers and offsets of the permutations x -> a x + b mod 2^32."""
    random = np.random.Generator(np.random.PCG64(0xCA3E11D))
    a, b = random.integers(0, 1 << 32, (2, PERMUTATIONS), dtype=np.uint32)
    return a | np.uint32(1), b


def common(left: Sequence[NDArray[np.uint32]], right: Sequence[NDArray[np.uint32]]) -> NDArray[np.int64]:
    """How many elements each pair of sorted sets shares."""
    if native.ready(tables):
        return native.common(left, right)
    pairs = zip(left, right, strict=True)
    return np.array([len(np.intersect1d(x, y, assume_unique=True)) for x, y in pairs], dtype=np.int64)


@cache
def _word_pattern() -> re.Pattern[str]:
    return re.compile(f"{char_class(LETTER | DIGIT | MARK, without=SOLID)}+|{char_class(SOLID)}")


def _word_hashes(text: str) -> list[int]:
    lower = lower_case()
    hashes = []
    for word in _word_pattern().findall(text):
        h = 0x9E3779B97F4A7C15
        for c in map(ord, word):
            h = ((h ^ (int(lower[c]) if c < LIMIT else c)) * 0x100000001B3) & _MASK
        hashes.append(_mix(h))
    return hashes


def _joined(hashes: Sequence[int]) -> int:
    h = len(hashes)
    for word in hashes:
        h = ((h ^ word) * 0x9FB21C651E98DF25) & _MASK
    return _mix(h)


def _mix(h: int) -> int:
    for _ in range(2):
        h = ((h ^ (h >> 32)) * 0xD6E8FEB86659FD93) & _MASK
    return h ^ (h >> 32)
