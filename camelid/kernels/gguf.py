"""GGUF's quantised blocks (native/gguf.cpp), for `formats.gguf_blocks`, which is the reference."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from camelid.kernels.library import library
from camelid.kernels.text import address
from camelid.kernels.threads import cores

KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")

WHOLE = ("Q8_0", "Q4_0", "Q4_1", "Q4_K")
PACKED = ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K")


def expand(kind: str, blocks: NDArray[np.uint8], values: int) -> NDArray[np.float32] | None:
    """Contiguous blocks [count, bytes] of a `kind` among KINDS -> float32 [count, values]; None where the library is
    not there."""
    native = library()
    if native is None:
        return None
    out = np.empty((len(blocks), values), np.float32)
    native.camelid_gguf_expand(KINDS.index(kind), address(blocks), ctypes.c_int64(len(blocks)), address(out), cores())
    return out


def whole(
    kind: str, blocks: NDArray[np.uint8], numbers: int, groups: int, has_least: bool
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16] | None] | None:
    """Contiguous blocks of a `kind` among WHOLE -> what `formats.gguf_blocks.whole` says: `numbers` bytes and `groups`
    scales of each; None where the library is not there."""
    native = library()
    if native is None:
        return None
    q = np.empty((len(blocks), numbers), np.uint8)
    scale = np.empty((len(blocks), groups), np.float16)
    least = np.empty_like(scale) if has_least else None
    native.camelid_gguf_whole(
        WHOLE.index(kind), address(blocks), ctypes.c_int64(len(blocks)), address(q), address(scale),
        None if least is None else address(least), cores(),
    )  # fmt: skip
    return q, scale, least


def pack(kind: str, values: NDArray[np.float32], size: int) -> NDArray[np.uint8] | None:
    """Contiguous values [count, values of a block] -> blocks [count, size] of a `kind`; None where that is not among
    PACKED, or the library is not there."""
    native = library()
    if native is None or kind not in PACKED:
        return None
    out = np.empty((len(values), size), np.uint8)
    native.camelid_gguf_pack(PACKED.index(kind), address(values), ctypes.c_int64(len(values)), address(out), cores())
    return out
