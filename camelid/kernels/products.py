"""Products of large bfloat16 matrices, as a training step multiplies: torch's, and natively on CPUs whose vectors
multiply bfloat16 and which have no AMX. There a weight is rounded while it is laid out, so that no copy of it is kept,
and its gradient is summed in float32, not rounded to bfloat16 on the way."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from camelid.kernels.byte_products import Bytes
from camelid.kernels.library import library
from camelid.kernels.packed import PLAIN
from camelid.kernels.precision import product_dtype

Weight = Tensor | Bytes  # of a product: as it is learned, or frozen in bytes

WORTH = 32  # rows of states from which on laying a weight out anew is worth it
A_ACROSS, B_ACROSS, B_IS_FLOAT, C_IS_BFLOAT, ADD = 1, 2, 4, 8, 16  # as native/products.cpp has them


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias: x [..., in], weight [out, in]. Under bfloat16 autocast the result is bfloat16; gradients
    have the dtypes of x and weight."""
    if product_dtype(x) == torch.bfloat16 != weight.dtype and takes(x, weight):
        out: Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
        return out if bias is None else out + bias.to(out.dtype)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        flat = x.to(torch.bfloat16).flatten(0, -2)
        ctx.save_for_backward(flat, weight)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return by_rows(flat, weight).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        slope = slope.to(torch.bfloat16).flatten(0, -2)
        d_x = by_columns(slope, weight).view(ctx.shape).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        d_weight = by_both(slope, x, torch.empty_like(weight), add=False) if ctx.needs_input_grad[1] else None
        return d_x, d_weight


def ready(weight: Weight, product: torch.dtype) -> Weight:
    """A weight as it is best given to several products in `product`: as it is where the native ones round it."""
    if isinstance(weight, Bytes) or (product == torch.bfloat16 and takes(weight)):
        return weight
    return weight.to(product)


def by_rows(x: Tensor, weight: Weight, out: Tensor | None = None) -> Tensor:
    """x @ weight.T in x's dtype: [tokens, in] and [out, in] -> [tokens, out], in `out` where it is given."""
    if isinstance(weight, Bytes):
        return weight.by_rows(x, out)
    if len(x) < WORTH or not _multiplies(x, weight):
        return torch.mm(x, weight.to(x.dtype).T, out=out)
    made = x.new_empty(len(x), len(weight)) if out is None else out
    return _product(x, weight, made, C_IS_BFLOAT)


def by_columns(slope: Tensor, weight: Weight) -> Tensor:
    """slope @ weight in slope's dtype: [tokens, out] and [out, in] -> [tokens, in]."""
    if isinstance(weight, Bytes):
        return weight.by_columns(slope)
    if len(slope) < WORTH or not _multiplies(slope, weight):
        return slope @ weight.to(slope.dtype)
    return _product(slope, weight, slope.new_empty(len(slope), weight.shape[1]), B_ACROSS | C_IS_BFLOAT)


def by_both(slope: Tensor, x: Tensor, total: Tensor, add: bool = True) -> Tensor:
    """total [out, in] += (or =) slope.T @ x of [tokens, out] and [tokens, in]; returns it."""
    if total.dtype == torch.float32 and _multiplies(slope, x):
        return _product(slope, x, total, A_ACROSS | B_ACROSS | (ADD if add else 0))
    if total.dtype == x.dtype:
        return total.addmm_(slope.T, x) if add else torch.mm(slope.T, x, out=total)
    return total.add_(slope.T @ x) if add else total.copy_(slope.T @ x)


def takes(*tensors: Tensor) -> bool:
    """Whether the native products are there and take tensors of this kind."""
    return (
        all(t.device.type == "cpu" and type(t) in PLAIN and t.dtype in _DTYPES for t in tensors)
        and not torch.compiler.is_compiling()
        and _there()
    )


_DTYPES = (torch.float32, torch.bfloat16)


@cache
def _there() -> bool:
    native = library()
    return native is not None and bool(native.camelid_multiplies_bfloat16())


def _multiplies(a: Tensor, b: Tensor) -> bool:
    return a.dtype == torch.bfloat16 and takes(a, b) and a.numel() > 0 and b.numel() > 0


def _product(a: Tensor, b: Tensor, c: Tensor, flags: int) -> Tensor:
    if isinstance(a, FakeTensor):  # a rehearsal: there is nothing to compute
        return c
    a, b = (t if t.stride(1) == 1 else t.contiguous() for t in (a, b))
    assert c.stride(1) == 1
    native = library()
    assert native is not None
    summed = a.shape[0] if flags & A_ACROSS else a.shape[1]
    shape = (ctypes.c_int64 * 6)(*c.shape, summed, a.stride(0), b.stride(0), c.stride(0))
    flags |= B_IS_FLOAT if b.dtype == torch.float32 else 0
    places = (ctypes.c_void_p(t.data_ptr()) for t in (a, b, c))
    native.camelid_product(shape, *places, ctypes.c_int(flags), ctypes.c_int(torch.get_num_threads()))
    return c
