"""Numbers into GGUF's quantised blocks, the inverse of `gguf_blocks`. The plain types follow ggml's reference bit for
bit; the _K types look for the scale and offset of each group by least squares over some candidates, as ggml does, with
errors weighted by how large a number is.

A model's type such as Q4_K_M is a mixture: which matrix gets which type of block says `block_type`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camelid.formats.gguf_blocks import BLOCKS, Bytes, Floats
from camelid.kernels import gguf as native

CHUNK = 1 << 22  # numbers at a time
MIXTURES = {"Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}
# What takes the place of a type whose blocks of 256 do not fit a matrix's rows (llama.cpp's choice).
INSTEAD = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def block_type(kind: str, name: str, columns: int, layers: int, tied: bool) -> str:
    """The type of a matrix called `name` in a file of `kind`, by llama.cpp's rule: the output projection and, of a
    mixture, in the first and last eighth of the layers and every third between, the values and the way down get six
    bits. Rows that fill no block of any kind are F16."""
    found = MIXTURES.get(kind, kind)
    if found in BLOCKS and found != "Q8_0" and name == ("token_embd.weight" if tied else "output.weight"):
        found = "Q6_K"
    elif kind in MIXTURES and (".attn_v." in name or ".ffn_down." in name):
        layer, eighth = int(name.split(".")[1]), layers // 8
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            found = "Q6_K"
    if found in BLOCKS and columns % BLOCKS[found][0]:
        found = INSTEAD.get(found, "F16")
    return "F16" if found in BLOCKS and columns % BLOCKS[found][0] else found


def quantize(kind: str, values: Floats) -> Bytes:
    """Rows of whole blocks -> their bytes."""
    pack, (size, width, _) = PACKERS[kind], BLOCKS[kind]
    blocks = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, size)
    if (found := native.pack(kind, blocks, width)) is not None:
        return found
    step = max(1, CHUNK // size)
    return np.concatenate([pack(blocks[start : start + step]) for start in range(0, len(blocks), step)])


def _inverse(d: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return np.where(d == 0, np.float32(0), 1 / d)


def _halves(d: Floats) -> Bytes:
    return d.astype(np.float16).view(np.uint8)


def _joined_nibbles(q: Bytes) -> Bytes:
    """The first half of the values low, the second high."""
    half = q.shape[1] // 2
    return (q[:, :half] & 15 | (q[:, half:] & 15) << 4).astype(np.uint8)


def _q8_0(x: Floats) -> Bytes:
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    steps = x * _inverse(d)
    rounded = np.trunc(np.abs(steps) + np.float32(0.5)) * np.sign(steps)
    return np.concatenate([_halves(d), rounded.astype(np.int8).view(np.uint8)], axis=1)


def _by_largest(x: Floats, levels: int) -> tuple[Floats, Bytes]:
    """Scale and whole numbers 0 … levels - 1 around the middle; the largest number lands on the lowest one."""
    d = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), 1) / np.float32(-levels // 2)
    places = x * _inverse(d) + np.float32(levels // 2 + 0.5)
    return d, np.trunc(places).clip(0, levels - 1).astype(np.uint8)


def _q4_0(x: Floats) -> Bytes:
    d, q = _by_largest(x, 16)
    return np.concatenate([_halves(d), _joined_nibbles(q)], axis=1)


def _fifth_bits(q: Bytes) -> Bytes:
    return np.packbits(q >> 4, axis=1, bitorder="little")


def _q5_0(x: Floats) -> Bytes:
    d, q = _by_largest(x, 32)
    return np.concatenate([_halves(d), _fifth_bits(q), _joined_nibbles(q)], axis=1)


def _q5_1(x: Floats) -> Bytes:
    least = x.min(axis=1, keepdims=True)
    d = (x.max(axis=1, keepdims=True) - least) / np.float32(31)
    q = np.trunc((x - least) * _inverse(d) + np.float32(0.5)).astype(np.uint8)
    return np.concatenate([_halves(d), _halves(least), _fifth_bits(q), _joined_nibbles(q)], axis=1)


def _scale_and_offset(x: Tensor, levels: int, least: float, step: float, tries: int) -> tuple[Tensor, Tensor]:
    """For groups [count, 32]: scale and offset, both not negative, so that x is nearest to scale * q - offset with q in
    0 … levels - 1, over candidates of how many levels the range is cut into."""
    top = levels - 1
    weight = x.square().mean(1, keepdim=True).sqrt() + x.abs()
    low, high = x.amin(1, keepdim=True).clamp_max(0), x.amax(1, keepdim=True)
    width = (high - low).clamp_min(1e-30)
    sum_w, sum_x = weight.sum(1), (weight * x).sum(1)

    def error(scale: Tensor, offset: Tensor, q: Tensor) -> Tensor:
        return (weight * (scale[:, None] * q + offset[:, None] - x).square()).sum(1)

    scale, offset = width[:, 0] / top, low[:, 0]
    best = error(scale, offset, ((x - low) * (top / width)).round().clamp(0, top))
    for number in range(tries + 1):
        now = offset[:, None]  # the best so far is where the next one starts
        q = ((x - now) * ((least + step * number + top) / (high - now).clamp_min(1e-30))).round().clamp(0, top)
        wq = weight * q
        sum_q, sum_qq, sum_xq = wq.sum(1), (wq * q).sum(1), (wq * x).sum(1)
        det = sum_w * sum_qq - sum_q.square()
        solvable = det > 0
        safe = torch.where(solvable, det, 1.0)
        s, m = (sum_w * sum_xq - sum_x * sum_q) / safe, (sum_qq * sum_x - sum_q * sum_xq) / safe
        above = m > 0  # an offset can only take away
        s, m = torch.where(above, sum_xq / sum_qq.clamp_min(1e-30), s), m.clamp_max(0)
        found = error(s, m, q)
        better = solvable & (found < best)
        scale, offset, best = (torch.where(better, a, b) for a, b in ((s, scale), (m, offset), (found, best)))
    return scale.clamp_min(0), -offset


def _six_bits(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[count, 8] numbers, none negative, as whole ones of six bits, their scale in float16, and what both say."""
    d = (x.amax(1, keepdim=True) / 63).half()
    q = (x * _reciprocal(x.amax(1, keepdim=True) / 63)).round().clamp(0, 63)
    return q.to(torch.uint8), d, d.float() * q


def _reciprocal(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.zeros_like(x), 1 / x)


def _packed_six_bits(scales: Bytes, offsets: Bytes) -> Bytes:
    """Eight scales and eight offsets in 12 bytes."""
    low = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    middle = offsets[:, :4] | (offsets[:, 4:] >> 4) << 6
    high = scales[:, 4:] & 15 | (offsets[:, 4:] & 15) << 4
    return np.concatenate([low, middle, high], axis=1).astype(np.uint8)


def _k_with_offset(x: Floats, levels: int, least: float, step: float, tries: int) -> tuple[Bytes, NDArray[np.uint8]]:
    """The head (two scales and 12 bytes) and the whole numbers [count, 256] of Q4_K and Q5_K."""
    groups = torch.from_numpy(x).view(-1, 32)
    # In float64: candidates that are nearly as good are told apart by the last bits.
    scale, offset = (t.float().view(-1, 8) for t in _scale_and_offset(groups.double(), levels, least, step, tries))
    scales, d, scale = _six_bits(scale)
    offsets, m, offset = _six_bits(offset)
    shifted = groups.view(-1, 8, 32) + offset[:, :, None]
    q = (shifted * _reciprocal(scale)[:, :, None]).round().clamp(0, levels - 1)
    q = torch.where(scale[:, :, None] == 0, 0, q).to(torch.uint8)
    head = np.concatenate(
        [_halves(d.numpy()), _halves(m.numpy()), _packed_six_bits(scales.numpy(), offsets.numpy())], 1
    )
    return head, q.view(-1, 256).numpy()


def _planes(q: Bytes, width: int, bits: int) -> Bytes:
    """Whole numbers of `bits` in stretches of 8 / bits planes of `width`, the inverse of `gguf_blocks._planes`."""
    parts = q.reshape(len(q), -1, 8 // bits, width)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[None, None, :, None]
    packed: Bytes = np.bitwise_or.reduce(parts << shifts, axis=2).reshape(len(q), -1).astype(np.uint8)
    return packed


def _q4_k(x: Floats) -> Bytes:
    head, q = _k_with_offset(x, 16, -1.0, 0.1, 20)
    return np.concatenate([head, _planes(q, 32, 4)], axis=1)


def _q5_k(x: Floats) -> Bytes:
    head, q = _k_with_offset(x, 32, -0.5, 0.1, 15)
    return np.concatenate(
        [head, _planes((q >> 4).astype(np.uint8), 32, 1), _planes((q & 15).astype(np.uint8), 32, 4)], axis=1
    )


def _q6_k(x: Floats) -> Bytes:
    groups = torch.from_numpy(x).view(-1, 16)
    weight = groups.square()
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    best = torch.full((len(groups),), -1.0)
    scale = torch.zeros(len(groups))
    for number in (0, *range(-9, 0), *range(1, 10)):
        q = (groups * (-(32 + 0.1 * number) * _reciprocal(largest))).round().clamp(-32, 31)
        sum_xq, sum_qq = (weight * groups * q).sum(1), (weight * q * q).sum(1)
        gain = torch.where(sum_qq > 0, sum_xq.square() / sum_qq.clamp_min(1e-38), -1.0)
        better = gain > best
        scale = torch.where(better, sum_xq / sum_qq.clamp_min(1e-38), scale)
        best = torch.where(better, gain, best)
    scale = scale.view(-1, 16)
    top = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    d = (top / -128).half()
    scales = (scale * _reciprocal(top / -128)).round().clamp(-128, 127)
    meant = d.float() * scales
    q = (groups.view(-1, 16, 16) * _reciprocal(meant)[:, :, None]).round().clamp(-32, 31)
    whole = (q + 32).to(torch.uint8).view(-1, 256).numpy()
    low, high = _planes((whole & 15).astype(np.uint8), 64, 4), _planes((whole >> 4).astype(np.uint8), 32, 2)
    signed = scales.to(torch.int8).numpy().view(np.uint8)
    return np.concatenate([low, high, signed, _halves(d.numpy())], axis=1)


PACKERS: dict[str, Callable[[Floats], Bytes]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
