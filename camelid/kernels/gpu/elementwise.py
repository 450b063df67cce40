"""Norm, rotation and gate in one pass each: `kernels.elementwise` has the references."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(x, weight, out, size, eps, WIDTH: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    wide = tl.load(x + row * size + d, mask=d < size, other=0.0).to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    kind = out.dtype.element_ty
    scaled = normed.to(kind).to(tl.float32) * tl.load(weight + d, mask=d < size, other=0.0).to(tl.float32)
    tl.store(out + row * size + d, scaled.to(kind), mask=d < size)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., size] -> the same."""
    x, size = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    _rms_norm[x.numel() // size,](x, weight, out, size, eps, WIDTH=triton.next_power_of_2(size))
    return out


@triton.jit
def _turn(
    x, cos, sin, out, heads, length, apart_row, apart_head, apart_token, turn_row, turn_token,
    HALF: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    h, d = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    kind = out.dtype.element_ty
    turn = row * turn_row + token * turn_token + d
    c = tl.load(cos + turn, mask=d < HALF, other=0.0).to(kind).to(tl.float32)[None, :]
    s = tl.load(sin + turn, mask=d < HALF, other=0.0).to(kind).to(tl.float32)[None, :]
    at = row * apart_row + token * apart_token + h[:, None] * apart_head + d[None, :]
    real = (h < heads)[:, None] & (d < HALF)[None, :]
    a = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    b = tl.load(x + at + HALF, mask=real, other=0.0).to(tl.float32)
    tl.store(out + at, (a * c - b * s).to(kind), mask=real)
    tl.store(out + at + HALF, (b * c + a * s).to(kind), mask=real)


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, heads, seq, head_dim] by cos and sin [seq, head_dim / 2] or [batch, seq, head_dim / 2], which are
    rounded to its dtype first. Laid out in memory as x is."""
    batch, heads, length, size = x.shape
    out = torch.empty_like(x)
    if out.stride() != x.stride():  # a part of something
        x = x.contiguous()
        out = torch.empty_like(x)
    cos, sin = cos.contiguous(), sin.contiguous()
    by_row = cos.stride(0) if cos.dim() == 3 else 0
    _turn[length, batch](
        x, cos, sin, out, heads, length, x.stride(0), x.stride(1), x.stride(2), by_row, size // 2,
        HALF=size // 2, WIDTH=triton.next_power_of_2(size // 2), HEADS=triton.next_power_of_2(heads),
    )  # fmt: skip
    return out


@triton.jit
def _swiglu(gate, up, out, numbers, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < numbers, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < numbers, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(out + at, ((g / (1 + tl.exp(-g))).to(kind).to(tl.float32) * u).to(kind), mask=at < numbers)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _swiglu[triton.cdiv(gate.numel(), 1024),](gate, up, out, gate.numel(), BLOCK=1024)
    return out
