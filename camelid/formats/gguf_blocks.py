"""GGUF's quantised blocks, expanded to float32 (ggml-quants.c and ggml-common.h) bit for bit as the gguf package does.

A block is a row of bytes; every function takes blocks [count, bytes] and gives values [count, values of a block]. The
types ending in _K and IQ4_XS have blocks of 256 values in sixteen or eight groups, the others of 32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from camelid.kernels import gguf as native

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

AT_ONCE = 1 << 22  # values
# IQ4's sixteen levels.
LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)


def half(raw: Bytes) -> Floats:
    """[count, 2] bytes -> [count, 1] numbers."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _nibbles(raw: Bytes) -> Bytes:
    """16 bytes -> 32 values: low nibbles first, then high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=1)


def _bits(raw: Bytes) -> Bytes:
    """4 bytes -> their 32 bits, the lowest first."""
    return np.unpackbits(raw, axis=1, bitorder="little")


def _q8_0(b: Bytes) -> Floats:
    return half(b[:, :2]) * np.ascontiguousarray(b[:, 2:]).view(np.int8).astype(np.float32)


def _q4_0(b: Bytes) -> Floats:
    return half(b[:, :2]) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: Bytes) -> Floats:
    return half(b[:, :2]) * _nibbles(b[:, 4:]).astype(np.float32) + half(b[:, 2:4])


def _q5_0(b: Bytes) -> Floats:
    q = _nibbles(b[:, 6:]) | _bits(b[:, 2:6]) << 4
    return half(b[:, :2]) * (q.astype(np.float32) - 16)


def _q5_1(b: Bytes) -> Floats:
    q = _nibbles(b[:, 8:]) | _bits(b[:, 4:8]) << 4
    return half(b[:, :2]) * q.astype(np.float32) + half(b[:, 2:4])


def _iq4_nl(b: Bytes) -> Floats:
    return half(b[:, :2]) * LEVELS[_nibbles(b[:, 2:])]


def _planes(raw: Bytes, width: int, bits: int) -> Bytes:
    """Bytes in stretches of `width`, each holding 8 / bits planes of `width` values, the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[None, None, :, None]
    planes = raw.reshape(len(raw), -1, 1, width) >> shifts & np.uint8((1 << bits) - 1)
    return planes.reshape(len(raw), -1)


def _grouped(scale: Floats, values: Floats, offset: Floats | None = None) -> Floats:
    """scale * values - offset, each of scale's columns over its share of the values."""
    parts = values.reshape(len(values), scale.shape[1], -1)
    found = scale[:, :, None] * parts
    if offset is not None:
        found = found - offset[:, :, None]
    return found.reshape(len(values), -1)


def _six_bits(raw: Bytes) -> tuple[Floats, Floats]:
    """Eight scales and eight offsets of six bits in 12 bytes: Q4_K's and Q5_K's."""
    low, middle, high = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = np.concatenate([low & 63, high & 15 | low >> 2 & 48], axis=1)
    offsets = np.concatenate([middle & 63, high >> 4 | middle >> 2 & 48], axis=1)
    return scales.astype(np.float32), offsets.astype(np.float32)


def _q2_k(b: Bytes) -> Floats:
    scales, d, least = b[:, :16], half(b[:, 80:82]), half(b[:, 82:84])
    values = _planes(b[:, 16:80], 32, 2).astype(np.float32)
    return _grouped(d * (scales & 15).astype(np.float32), values, least * (scales >> 4).astype(np.float32))


def _q3_k(b: Bytes) -> Floats:
    low, high = b[:, 96:104], b[:, 104:108]
    four = np.concatenate([low & 15, low >> 4], axis=1)
    two = _planes(high, 4, 2)
    scales = (four | two << 4).astype(np.int8).astype(np.float32) - 32
    third = _planes(b[:, :32], 32, 1)
    values = _planes(b[:, 32:96], 32, 2).astype(np.float32) - 4 * (third ^ 1).astype(np.float32)
    return _grouped(half(b[:, 108:110]) * scales, values)


def _q4_k(b: Bytes) -> Floats:
    scales, offsets = _six_bits(b[:, 4:16])
    values = _planes(b[:, 16:], 32, 4).astype(np.float32)
    return _grouped(half(b[:, :2]) * scales, values, half(b[:, 2:4]) * offsets)


def _q5_k(b: Bytes) -> Floats:
    scales, offsets = _six_bits(b[:, 4:16])
    values = _planes(b[:, 48:], 32, 4) | _planes(b[:, 16:48], 32, 1) << 4
    return _grouped(half(b[:, :2]) * scales, values.astype(np.float32), half(b[:, 2:4]) * offsets)


def _q6_k(b: Bytes) -> Floats:
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    values = _planes(b[:, :128], 64, 4) | _planes(b[:, 128:192], 32, 2) << 4
    return _grouped(half(b[:, 208:210]) * scales, values.astype(np.float32) - 32)


def _iq4_xs(b: Bytes) -> Floats:
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=2).reshape(len(b), 8)
    words = np.ascontiguousarray(b[:, 2:4]).view(np.uint16)
    high = (words >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)
    scales = (low | high << 4).astype(np.float32) - 32
    values = LEVELS[_planes(b[:, 8:], 16, 4)]
    return _grouped(half(b[:, :2]) * scales, values)


# By type: values and bytes of a block, and its expansion.
BLOCKS: dict[str, tuple[int, int, Callable[[Bytes], Floats]]] = {
    "Q8_0": (32, 34, _q8_0), "Q4_0": (32, 18, _q4_0), "Q4_1": (32, 20, _q4_1), "Q5_0": (32, 22, _q5_0),
    "Q5_1": (32, 24, _q5_1), "IQ4_NL": (32, 18, _iq4_nl), "Q2_K": (256, 84, _q2_k), "Q3_K": (256, 110, _q3_k),
    "Q4_K": (256, 144, _q4_k), "Q5_K": (256, 176, _q5_k), "Q6_K": (256, 210, _q6_k), "IQ4_XS": (256, 136, _iq4_xs),
}  # fmt: skip


def expand(kind: str, raw: Bytes) -> Floats:
    """Any number of bytes of whole blocks -> their values, flat."""
    size, width, function = BLOCKS[kind]
    blocks = raw.reshape(-1, width)
    if (found := native.expand(kind, blocks, size)) is not None:
        return found.reshape(-1)
    values, at_once = np.empty((len(blocks), size), np.float32), max(1, AT_ONCE // size)
    for first in range(0, len(blocks), at_once):  # or what lies between would take several times the result
        values[first : first + at_once] = function(blocks[first : first + at_once])
    return values.reshape(-1)


# Types whose values are whole numbers times a scale for every 32: their bits, and whether a least value is added.
WHOLE = {"Q8_0": (8, False), "Q4_0": (4, False), "Q4_1": (4, True), "Q4_K": (4, True)}
Halves = NDArray[np.float16]


def whole(kind: str, raw: Bytes) -> tuple[Bytes, Halves, Halves | None]:
    """Blocks of a type of WHOLE as `model.quantized.Integers` keeps them: q uint8 [blocks, bytes], of 4 bits two a
    byte, the even one low; scale and, of some, least [blocks, groups]. Exact but for Q4_K, whose scales and offsets are
    products, here rounded to float16."""
    size, width, _ = BLOCKS[kind]
    bits, has_least = WHOLE[kind]
    blocks = raw.reshape(-1, width)
    if (found := native.whole(kind, blocks, size * bits // 8, size // 32, has_least)) is not None:
        return found
    if kind == "Q8_0":
        return blocks[:, 2:] ^ np.uint8(128), _halves_at(blocks, 0), None
    if kind == "Q4_K":
        scales, offsets = _six_bits(blocks[:, 4:16])
        scale, least = half(blocks[:, :2]) * scales, -(half(blocks[:, 2:4]) * offsets)
        return _neighbours(_planes(blocks[:, 16:], 32, 4)), scale.astype(np.float16), least.astype(np.float16)
    q = _neighbours(_nibbles(blocks[:, 4 if has_least else 2 :]))
    return q, _halves_at(blocks, 0), _halves_at(blocks, 2) if has_least else None


def _halves_at(blocks: Bytes, at: int) -> Halves:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _neighbours(q: Bytes) -> Bytes:
    packed: Bytes = np.bitwise_or(q[:, ::2], q[:, 1::2] << 4, dtype=np.uint8)
    return packed
