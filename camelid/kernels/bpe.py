"""The native tokenizer (native/bpe.cpp): many texts to ids in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from camelid.kernels.library import library
from camelid.kernels.text import Packed, address, pack
from camelid.kernels.threads import cores

WHOLE, GPT2, DIGITS_GPT2, LLAMA3, LLAMA3_DIGITS = range(5)
"""How text is cut before merging: not at all, or by these regular expressions (native/split.hpp)."""

GROUP, GROUP_CHARACTERS = 256, 32 << 20  # texts handed over at once: their number, and about how long they are

_given = False


def ready(classes: Callable[[], NDArray[np.uint8]]) -> bool:
    """Is the native path available? The first time, `classes` gives it the characters (tokenizer/native.py)."""
    global _given
    loaded = library()
    if loaded is None:
        return False
    if not _given:
        loaded.camelid_set_split_classes(address(classes()))
        loaded.camelid_bpe_new.restype = ctypes.c_void_p
        for function in (loaded.camelid_split, loaded.camelid_pieces_count, loaded.camelid_bpe_train):
            function.restype = ctypes.c_int64
        loaded.camelid_pieces_new.restype = ctypes.c_void_p
        _given = True
    return True


def grouped(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in order, as many together as are handed over at once."""
    group, size = list[str](), 0
    for text in texts:
        group.append(text)
        size += len(text)
        if len(group) == GROUP or size >= GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def split(text: bytes, kind: int) -> NDArray[np.int64]:
    """Where the pieces of a text end, in bytes."""
    ends = np.empty(len(text), dtype=np.int64)
    count = _library().camelid_split(text, ctypes.c_int64(len(text)), kind, address(ends))
    return ends[:count]


class NativeBpe:
    """A tokenizer's merges, held by the library.

    tokens: the bytes of every id, empty for ids that text never becomes; merges uint32 [merges, 3]: left, right,
    result, best first; byte_ids uint32 [256]: the id of a single byte. ignore_merges: a piece that is a token is that
    token. prefix_blank: a blank is put before every text that is not empty.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        merges: NDArray[np.uint32],
        byte_ids: NDArray[np.uint32],
        kind: int,
        ignore_merges: bool = False,
        prefix_blank: bool = False,
    ) -> None:
        self.tokens, self.kind = tokens, kind
        packed = pack(tokens)
        self._free = _library().camelid_bpe_free
        self.handle = ctypes.c_void_p(
            _library().camelid_bpe_new(
                address(packed.data), address(packed.offsets), ctypes.c_int64(len(tokens)), address(merges),
                ctypes.c_int64(len(merges)), address(byte_ids), kind, int(ignore_merges), int(prefix_blank),
            )
        )  # fmt: skip

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._free(self.handle)

    def encode(self, texts: Sequence[str], threads: int | None = None) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """The ids of all texts end to end, uint32, and where each text's begin, int64 [texts + 1].

        Raises UnicodeEncodeError for a text with half a surrogate pair.
        """
        packed: Packed = pack(texts)
        out = np.empty(int(packed.offsets[-1]) + len(texts), dtype=np.uint32)
        offsets = np.empty(len(texts) + 1, dtype=np.int64)
        _library().camelid_bpe_encode(
            self.handle, address(packed.data), address(packed.offsets), ctypes.c_int64(len(texts)),
            threads or cores(), address(out), address(offsets),
        )  # fmt: skip
        return out[: offsets[-1]].copy(), offsets


class PieceCounter:
    """Counts the pieces of texts on all cores, for `learn`. `skipped`: pieces of more than 4096 bytes, left out."""

    def __init__(self, kind: int, threads: int | None = None) -> None:
        self.kind, self.skipped = kind, 0
        self._free = _library().camelid_pieces_free
        self._handle = ctypes.c_void_p(_library().camelid_pieces_new(threads or cores()))

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._free(self._handle)

    def add(self, texts: Iterable[str]) -> None:
        for group in grouped(texts):
            packed = pack(group)
            self.skipped = _library().camelid_pieces_count(
                self._handle, address(packed.data), address(packed.offsets), ctypes.c_int64(len(group)), self.kind
            )

    def learn(
        self,
        base: NativeBpe,
        vocab_size: int,
        tokens: Sequence[bytes] | None = None,
        min_frequency: int = 1,
        foreign_only: bool = False,
    ) -> NDArray[np.uint32]:
        """Merges on top of `base`'s until there are `vocab_size` tokens: uint32 [merges, 3], left, right, result.

        The commonest pair first, the smallest ids first among equals; pairs rarer than `min_frequency` are left.
        tokens: the bytes of every id, if not the base's; an empty one is never merged. foreign_only: every new token
        holds a byte beyond ASCII, so that ASCII text is encoded as before.
        """
        packed = pack(base.tokens if tokens is None else tokens)
        rows = np.empty((2 * max(0, vocab_size - len(packed)) + 1, 3), dtype=np.uint32)
        count = _library().camelid_bpe_train(
            self._handle, base.handle, address(packed.data), address(packed.offsets), ctypes.c_int64(len(packed)),
            ctypes.c_int64(vocab_size), ctypes.c_int64(min_frequency), int(foreign_only), address(rows),
            ctypes.c_int64(len(rows)),
        )  # fmt: skip
        return rows[:count]


def _library() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None, "call ready() first"
    return loaded
