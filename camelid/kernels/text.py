"""The native functions over texts (native/*.cpp): many texts in one call, laid end to end.

Each returns what its Python reference returns. Call `ready` first: it loads the library and hands it the character
tables.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camelid.kernels.library import library

_given = False


def ready(tables: Callable[[], tuple[NDArray[np.uint8], NDArray[np.uint32]]]) -> bool:
    """Is the native path available? The first time, `tables` gives it the character classes and lower cases."""
    global _given
    loaded = library()
    if loaded is None:
        return False
    if not _given:
        classes, lower = tables()
        loaded.camelid_set_characters(address(classes), address(lower))
        _given = True
    return True


@dataclass(frozen=True)
class Packed:
    """Texts as UTF-8 end to end: `data` uint8 [bytes], `offsets` int64 [texts + 1]."""

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def pack(texts: Sequence[str] | Sequence[bytes]) -> Packed:
    """Lay texts, or the bytes of texts, end to end."""
    encoded = [text.encode() if isinstance(text, str) else text for text in texts]
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(e) for e in encoded], out=offsets[1:])
    return Packed(np.frombuffer(b"".join(encoded) or b"\0", dtype=np.uint8), offsets)


def statistics(packed: Packed) -> NDArray[np.float64]:
    """Figures of each text, float64 [texts, fields], in the order of corpus/statistics.py."""
    out = np.empty((len(packed), _library().camelid_statistics_fields()), dtype=np.float64)
    _library().camelid_statistics(address(packed.data), address(packed.offsets), _int64(len(packed)), address(out))
    return out


def c4(packed: Packed, min_sentences: int, min_words: int, max_word_length: int) -> tuple[list[str], list[int]]:
    """The texts with their C4 lines only, and their verdicts (corpus/c4.py)."""
    out = np.empty(len(packed.data), dtype=np.uint8)
    offsets = np.empty(len(packed) + 1, dtype=np.int64)
    verdicts = np.empty(len(packed), dtype=np.int32)
    _library().camelid_c4(
        address(packed.data), address(packed.offsets), _int64(len(packed)), min_sentences, min_words, max_word_length,
        address(out), address(offsets), address(verdicts),
    )  # fmt: skip
    raw = out.tobytes()
    return [raw[a:b].decode() for a, b in itertools.pairwise(offsets)], verdicts.tolist()


def shingles(packed: Packed, n: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Sorted distinct hashes of each text's n-word shingles, end to end, and where each text's begin."""
    return _hashes("camelid_shingles", packed, n, np.empty(len(packed.data) + len(packed), dtype=np.uint32))


def sequences(packed: Packed, n: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """64-bit hashes of each text's n-word sequences in order, end to end, and where each text's begin."""
    return _hashes("camelid_sequences", packed, n, np.empty(len(packed.data) + len(packed), dtype=np.uint64))


def _hashes(function: str, packed: Packed, n: int, out: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    offsets = np.empty(len(packed) + 1, dtype=np.int64)
    call = getattr(_library(), function)
    call(address(packed.data), address(packed.offsets), _int64(len(packed)), n, address(out), address(offsets))
    return out[: offsets[-1]].copy(), offsets


def minhash(
    shingle_hashes: NDArray[np.uint32],
    offsets: NDArray[np.int64],
    a: NDArray[np.uint32],
    b: NDArray[np.uint32],
) -> NDArray[np.uint32]:
    """Signatures uint32 [texts, permutations]; the number of permutations is a multiple of 64."""
    out, hashes = np.empty((len(offsets) - 1, len(a)), dtype=np.uint32), np.ascontiguousarray(shingle_hashes)
    _library().camelid_minhash(
        address(hashes),
        address(offsets),
        _int64(len(out)),
        address(a),
        address(b),
        len(a),
        address(out),
    )
    return out


def common(left: Sequence[NDArray[np.uint32]], right: Sequence[NDArray[np.uint32]]) -> NDArray[np.int64]:
    """Sizes of the intersections of sorted sets, pair by pair: int64 [pairs]."""
    out = np.empty(len(left), dtype=np.int64)
    pointers = [np.array([s.ctypes.data for s in side], dtype=np.uintp) for side in (left, right)]
    sizes = [np.array([len(s) for s in side], dtype=np.int64) for side in (left, right)]
    _library().camelid_common(
        address(pointers[0]),
        address(sizes[0]),
        address(pointers[1]),
        address(sizes[1]),
        _int64(len(left)),
        address(out),
    )
    return out


def _library() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None, "call ready() first"
    return loaded


def address(array: NDArray[Any]) -> ctypes.c_void_p:
    """Where an array lies, for a native call."""
    return ctypes.c_void_p(array.ctypes.data)


_int64 = ctypes.c_int64
