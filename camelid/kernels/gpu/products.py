"""Products with weights that are kept as small integers: few rows of inputs by the integers themselves, many by the
weight widened for the moment."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _number(q):
    """A byte as float32, by its bits: below those of 2^23 it is that much more."""
    return (q.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _one_row(
    x, packed, scale, zero, bias, out, rows, columns,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x [columns] by ROWS rows of the weight, BLOCK columns at a time, group by group."""
    groups: tl.constexpr = BLOCK // GROUP
    held: tl.constexpr = GROUP * BITS // 8  # bytes of a group
    n, g = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, groups)
    sums = tl.zeros([ROWS, groups], tl.float32)
    for first in range(0, columns // GROUP, groups):
        group = first + g
        there = group < columns // GROUP
        place = n[:, None] * (columns // GROUP) + group[None, :]
        real = (n < rows)[:, None] & there[None, :]
        worth = tl.load(scale + place, mask=real, other=0.0).to(tl.float32)
        middle = tl.load(zero + place, mask=real, other=0).to(tl.float32) if ZEROS else 2.0 ** (BITS - 1)
        q = tl.load(
            packed + place[:, :, None] * held + tl.arange(0, held)[None, None, :], mask=real[:, :, None], other=0
        )
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        a = tl.load(x + column, mask=there[:, None], other=0.0).to(tl.float32)
        if BITS == 8:
            found = tl.sum(_number(q) * a[None], 2)
        else:
            even, odd = tl.split(tl.reshape(a, [groups, held, 2]))
            found = tl.sum(_number(q & 15) * even[None] + _number(q >> 4) * odd[None], 2)
        sums += (found - middle * tl.sum(a, 1)[None, :]) * worth
    total = tl.sum(sums, 1)
    if BIAS:
        total += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)
    tl.store(out + n, total.to(out.dtype.element_ty), mask=n < rows)


@triton.jit
def _wide(
    q, scale, zero, place, real, ZEROS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """Steps [rows, n] times the scales of their groups, each of GROUP of them, at `place` [rows, groups]."""
    worth = tl.load(scale + place, mask=real, other=0.0).to(tl.float32)
    steps = tl.reshape(_number(q), [place.shape[0], place.shape[1], GROUP])
    if ZEROS:
        steps -= tl.load(zero + place, mask=real, other=0).to(tl.float32)[:, :, None]
    else:
        steps -= 2.0 ** (BITS - 1)
    return tl.reshape(steps * worth[:, :, None], [place.shape[0], place.shape[1] * GROUP]).to(kind)


@triton.jit
def _few_rows(
    x, packed, scale, zero, bias, out, inputs, rows, columns,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, INPUTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [inputs, columns], INPUTS of them, by ROWS rows of the weight, BLOCK columns at a time."""
    each: tl.constexpr = 8 // BITS  # columns in a byte
    kind: tl.constexpr = x.dtype.element_ty
    n, m = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    g, j, k = tl.arange(0, BLOCK // GROUP), tl.arange(0, BLOCK // each), tl.arange(0, BLOCK)
    sums = tl.zeros([ROWS, INPUTS], tl.float32)
    for first in range(0, columns, BLOCK):
        byte = first // each + j
        there = (n < rows)[:, None] & (byte * each < columns)[None, :]
        q = tl.load(packed + n[:, None] * (columns // each) + byte[None, :], mask=there, other=0)
        group = first // GROUP + g
        place = n[:, None] * (columns // GROUP) + group[None, :]
        real = (n < rows)[:, None] & (group < columns // GROUP)[None, :]
        there = (m < inputs)[:, None] & (first + k < columns)[None, :]
        a = tl.load(x + m[:, None] * columns + (first + k)[None, :], mask=there, other=0.0)
        if BITS == 8:
            w = _wide(q, scale, zero, place, real, ZEROS, BITS, GROUP, kind)
            sums += tl.dot(w, tl.trans(a), input_precision="ieee")
        else:
            even, odd = tl.split(tl.reshape(a, [INPUTS, BLOCK // 2, 2]))
            low = _wide(q & 15, scale, zero, place, real, ZEROS, BITS, GROUP // 2, kind)
            high = _wide(q >> 4, scale, zero, place, real, ZEROS, BITS, GROUP // 2, kind)
            sums += tl.dot(low, tl.trans(even), input_precision="ieee")
            sums += tl.dot(high, tl.trans(odd), input_precision="ieee")
    if BIAS:
        sums += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
    real = (m < inputs)[None, :] & (n < rows)[:, None]
    tl.store(out + m[None, :] * rows + n[:, None], sums.to(out.dtype.element_ty), mask=real)


@triton.jit
def _widen(
    packed, scale, zero, out, bytes_,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weights of BLOCK bytes, wherever they are: groups follow each other in memory as rows do."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = byte < bytes_
    q = tl.load(packed + byte, mask=inside, other=0)
    group = byte * (8 // BITS) // GROUP
    worth = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    middle = tl.load(zero + group, mask=inside, other=0).to(tl.float32) if ZEROS else 2.0 ** (BITS - 1)
    kind: tl.constexpr = out.dtype.element_ty
    if BITS == 8:
        tl.store(out + byte, ((q.to(tl.float32) - middle) * worth).to(kind), mask=inside)
    else:
        tl.store(out + 2 * byte, (((q & 15).to(tl.float32) - middle) * worth).to(kind), mask=inside)
        tl.store(out + 2 * byte + 1, (((q >> 4).to(tl.float32) - middle) * worth).to(kind), mask=inside)


MOST_INPUTS = 64  # beyond which the weight is widened first
# Of those tried on an H100, bits by bits, the fastest: rows of the weight to a program, columns at a time.
ONE_ROW = {8: (2, 1024), 4: (4, 1024)}
FEW_ROWS = 32, 256
GROUPS = (32, 64, 128, 256)  # that the products take as they are


def product(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int) -> Tensor:
    """x [inputs, columns] by the transposed weight of `model.quantized.Integers`: [inputs, rows]."""
    x = x.contiguous()
    rows, columns, inputs = len(packed), x.shape[1], len(x)
    group = columns // scale.shape[1]
    if inputs > MOST_INPUTS or group not in GROUPS or packed.numel() >= 2**31:
        return F.linear(x, widened(packed, scale, zero, bits, x.dtype), bias)
    out = x.new_empty(inputs, rows)
    kinds = {"BITS": bits, "GROUP": group, "ZEROS": zero is not None, "BIAS": bias is not None}
    absent = scale
    parts = (packed, scale, absent if zero is None else zero, absent if bias is None else bias, out)
    if inputs == 1:
        width, block = ONE_ROW[bits]
        _one_row[triton.cdiv(rows, width),](x, *parts, rows, columns, **kinds, ROWS=width, BLOCK=block)
    else:
        (width, block), high = FEW_ROWS, max(16, triton.next_power_of_2(inputs))
        # Of float32 less at a time: a multiprocessor keeps 99 KiB on many cards.
        block, stages = (block, 3) if x.itemsize == 2 else (max(group, block // 4), 1)
        _few_rows[triton.cdiv(rows, width), triton.cdiv(inputs, high)](
            x, *parts, inputs, rows, columns, **kinds, INPUTS=high, ROWS=width, BLOCK=block, num_stages=stages,
        )  # fmt: skip
    return out


def widened(packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """`Integers.dense`: [rows, columns]."""
    out = torch.empty(len(packed), packed.shape[1] * 8 // bits, dtype=dtype, device=packed.device)
    group, block = out.shape[1] // scale.shape[1], 1024
    _widen[triton.cdiv(packed.numel(), block),](
        packed, scale, scale if zero is None else zero, out, packed.numel(),
        BITS=bits, GROUP=group, ZEROS=zero is not None, BLOCK=block,
    )  # fmt: skip
    return out
