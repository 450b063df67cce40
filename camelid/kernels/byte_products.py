"""Products with a frozen weight of bytes while something on top of it learns, on CPUs whose vectors multiply bytes and
which have no AMX: twice the speed of bfloat16, and the weight is never widened.

The other side is rounded to bytes by blocks of BLOCK values: states as they are, slopes times the scales of the
weight's rows. So both products are with one and the same matrix, W = scale * (q - 128), and a slope passes a rounding
as if there were none.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from camelid.kernels.library import library
from camelid.kernels.packed import PLAIN, pointer

BLOCK = 128  # values that share a step, as native/byte_products.cpp has it
LINE = 64  # bytes
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Bytes:
    """A weight [out, in] that is multiplied as it is: scale * (q - 128). q uint8 [out, in], scale float32 [out]."""

    q: Tensor
    scale: Tensor

    def __len__(self) -> int:
        return len(self.q)

    def by_rows(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x @ W.T in x's dtype: [tokens, in] -> [tokens, out], in `out` where it is given."""
        return self._product(x, x.new_empty(len(x), len(self.q)) if out is None else out, across=False)

    def by_columns(self, slope: Tensor) -> Tensor:
        """slope @ W in slope's dtype: [tokens, out] -> [tokens, in]."""
        return self._product(slope, slope.new_empty(len(slope), self.q.shape[1]), across=True)

    def _product(self, a: Tensor, c: Tensor, across: bool) -> Tensor:
        q, scale, (rows, summed) = self.q, self.scale, a.shape
        if summed != q.shape[0 if across else 1] or len(scale) != len(q):
            raise ValueError(f"{summed} values a row do not meet a weight of {tuple(q.shape)}, {len(scale)} scales")
        dtypes = a.dtype, c.dtype, q.dtype, scale.dtype
        if dtypes not in [(d, d, torch.uint8, torch.float32) for d in DTYPES] or not multiplies(a.device):
            raise ValueError(f"bytes are not multiplied with {dtypes} on {a.device}")
        row = -(-summed // (2 * LINE)) * 2 * LINE + LINE  # an odd number of lines: rows do not put one another out
        rounded = a.new_empty(rows, row, dtype=torch.int8)
        blocks = rows, -(-summed // BLOCK)
        steps, sums = a.new_empty(blocks, dtype=torch.float32), a.new_empty(blocks, dtype=torch.int32)
        if isinstance(a, FakeTensor):  # a rehearsal: there is nothing to compute
            return c
        if c.numel() == 0 or summed == 0:
            return c.zero_()
        a, q = (t if t.stride(1) == 1 else t.contiguous() for t in (a, q))
        shape = (ctypes.c_int64 * 7)(*c.shape, summed, a.stride(0), q.stride(0), c.stride(0), row)
        native = library()
        assert native is not None
        native.camelid_byte_product(
            shape, *map(pointer, (a, q, scale, c, rounded, steps, sums)), ctypes.c_int(a.dtype == torch.bfloat16),
            ctypes.c_int(across), ctypes.c_int(torch.get_num_threads()),
        )  # fmt: skip
        return c


def takes(x: Tensor) -> bool:
    """Whether the native products are there and take states, or slopes, of this kind."""
    return type(x) in PLAIN and x.dtype in DTYPES and multiplies(x.device) and not torch.compiler.is_compiling()


def multiplies(device: torch.device) -> bool:
    """Whether a device has these products."""
    return device.type == "cpu" and _there()


@cache
def _there() -> bool:
    native = library()
    return native is not None and bool(native.camelid_multiplies_bytes())
