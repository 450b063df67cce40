"""Products with an adapter's narrow matrices, as a step in bfloat16 makes them: down to its rank, up from it, and
between both sides, its gradients. Natively on the CPUs of `kernels/products.py`, where oneDNN takes up to twice as long
for rows a power of two apart; torch's elsewhere."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from camelid.kernels.library import library
from camelid.kernels.packed import pointer
from camelid.kernels.products import WORTH, takes

NARROW = 16  # the largest rank: what a register holds; wider products are torch's best, too


def down(x: Tensor, w: Tensor, scale: float) -> Tensor:
    """scale * x @ w in x's dtype: [tokens, wide] and [wide, rank] -> [tokens, rank]."""
    rank = w.shape[1]
    if not _takes(x, w, rank, x.shape[1] == len(w)):
        made = x @ w.to(x.dtype)
        return made if scale == 1 else made.mul_(scale)
    y = x.new_empty(len(x), rank)
    return _native("down", (*x.shape, rank), x, w, y, scale, w.dtype == torch.float32)


def up_(z: Tensor, y: Tensor, w: Tensor, scale: float) -> Tensor:
    """z += scale * y @ w: [tokens, wide], [tokens, rank] and [rank, wide]. Returns z."""
    meet = y.dtype == z.dtype and y.shape == (len(z), len(w)) and z.shape[1] == w.shape[1] and z.stride(1) == 1
    if not _takes(z, w, len(w), meet and z.stride(0) >= z.shape[1]):
        return z.addmm_(y, w.to(y.dtype), alpha=scale)
    return _native("up", (*z.shape, len(w)), y, w, z, scale, w.dtype == torch.float32)


def between(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a.T @ b, where one of both is narrow: [tokens, rank] and [tokens, wide] -> [rank, wide], or exchanged.
    Natively the sums are float32 and stay it."""
    turned = a.shape[1] > b.shape[1]
    narrow, wide = (b, a) if turned else (a, b)
    if not _takes(wide, narrow, narrow.shape[1], a.dtype == b.dtype and len(a) == len(b)):
        made = narrow.T @ wide
        made = made if scale == 1 else made.mul_(scale)
        return made.T if turned else made
    g = a.new_empty(a.shape[1], b.shape[1], dtype=torch.float32)
    return _native("between", (*wide.shape, narrow.shape[1]), wide, _rows(narrow), g, scale, turned)


def _takes(wide: Tensor, other: Tensor, rank: int, meet: bool) -> bool:
    """Whether a native product is there for tensors that `meet` one another: what does not, torch refuses."""
    fits = meet and wide.dtype == torch.bfloat16 and len(wide) >= WORTH and wide.shape[1] > 0
    return fits and rank % 2 == 0 < rank <= NARROW and takes(wide, other)


def _rows(x: Tensor) -> Tensor:
    """x, its rows' values side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _native(
    what: str, shape: tuple[int, int, int], a: Tensor, b: Tensor, c: Tensor, scale: float, flag: bool
) -> Tensor:
    """One of native/narrow_products.cpp of tokens, width and rank, into c."""
    if isinstance(a, FakeTensor):  # a rehearsal: there is nothing to compute
        return c
    a = _rows(a)
    b = b if b.stride(0) == 1 else _rows(b)
    assert c.stride(1) == 1
    across = b.stride(1) == 1
    numbers = (ctypes.c_int64 * 6)(*shape, a.stride(0), b.stride(0 if across else 1), c.stride(0))
    flags = (flag,) if what == "between" else (flag, across)
    native = library()
    assert native is not None
    product = getattr(native, f"camelid_narrow_{what}")
    whole = map(ctypes.c_int, (*flags, torch.get_num_threads()))
    product(numbers, *map(pointer, (a, b, c)), ctypes.c_float(scale), *whole)
    return c
