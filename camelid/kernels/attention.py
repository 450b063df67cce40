"""softmax(Q K^T / sqrt(d_k)) V over packed documents: the torch reference, the native kernel on a CPU, and
flash attention over documents laid end to end on a GPU.

Both skip what a query may not see, the later tokens and the other documents; the reference computes the whole square
when there is a mask.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from camelid.kernels.library import library


@dataclass(frozen=True)
class Documents:
    """Which tokens of packed rows may see each other: `ids` int64 [batch, seq], earlier tokens of the same id."""

    ids: Tensor

    @cached_property
    def mask(self) -> Tensor:
        """bool [batch, 1, seq, seq], True where a query (row) may look."""
        same = self.ids[:, :, None] == self.ids[:, None, :]
        return same.tril()[:, None]

    @cached_property
    def firsts(self) -> Tensor | None:
        """The position of each token's document's first token, int32 [batch, seq]; None when an id comes back after
        another one, so that its document is not one stretch."""
        positions = torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)
        starts = torch.ones_like(self.ids, dtype=torch.bool)
        starts[:, 1:] = self.ids[:, 1:] != self.ids[:, :-1]
        ordered = self.ids.sort(1).values
        distinct = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)
        if bool((starts.sum(1) > distinct).any()):
            return None
        return torch.where(starts, positions, 0).cummax(1).values.int()

    def end_to_end(self) -> Stretches | None:
        """All rows' documents, one after the other; None where `firsts` is."""
        if self.firsts is None:
            return None
        rows, length = self.ids.shape
        begins = self.firsts == torch.arange(length, device=self.ids.device)
        cuts = begins.flatten().nonzero().flatten()
        return Stretches(torch.cat((cuts, cuts.new_tensor([rows * length]))).int(), length)


@dataclass(frozen=True)
class Stretches:
    """Documents laid end to end: `cuts` int32 [documents + 1], where each begins and the last one ends, and a length
    that none exceeds."""

    cuts: Tensor
    longest: int


Mask = Tensor | Documents | Stretches | None
"""Which keys a query may look at: see `attention`."""


def packed(document_ids: Tensor, dtype: torch.dtype, head_dim: int) -> Documents | Stretches:
    """The mask of packed rows, int64 [batch, seq], in the form that attention over `dtype` wants on this device."""
    documents = Documents(document_ids)
    on_gpu = document_ids.device.type == "cuda" and torch.cuda.get_device_capability(document_ids.device) >= (8, 0)
    if on_gpu and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256:
        return documents.end_to_end() or documents
    return documents


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """softmax(Q K^T / sqrt(d_k)) V over [batch, heads, seq, head_dim]; k and v may have fewer heads.

    `mask` is bool, True where a query may look, broadcastable to [batch, heads, q_len, k_len], or what `packed` made.
    None means causal, of as many queries as keys; or of one query, which comes last.
    """
    if isinstance(mask, Stretches):
        return _flash(q, k, v, mask)
    causal = False
    if mask is None and q.shape[2] > 1:  # a branch, for to the compiler the length may be unknown, but not this
        causal = True
        if q.shape[2] != k.shape[2]:
            raise ValueError("a causal mask over cached keys must be given explicitly")
    if not isinstance(mask, Tensor) and _native_takes(q, k, v):
        firsts = _from_zero(q) if mask is None else mask.firsts
        if firsts is not None and firsts.shape == (q.shape[0], q.shape[2]):
            out: Tensor = _NativeAttention.apply(q, k, v, firsts)  # type: ignore[no-untyped-call]
            return out
    if isinstance(mask, Documents):
        mask = mask.mask
    if q.shape[2] == 1 and q.shape[1] != k.shape[1] and (mask is None or mask.shape[1] == 1):
        # One query of each of a group's heads is several queries of the group's one: no key is repeated for it.
        grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).flatten(1, 2)[:, :, None]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def _flash(q: Tensor, k: Tensor, v: Tensor, documents: Stretches) -> Tensor:
    """torch's own flash attention, which `varlen_attn` wraps: its operator takes fewer key heads in every torch that we
    support, the wrapper does not."""
    batch, heads, length, size = q.shape
    joined = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    cuts, longest = documents.cuts, documents.longest
    out: Tensor = torch.ops.aten._flash_attention_forward(*joined, cuts, cuts, longest, longest, 0.0, True, False)[0]
    return out.view(batch, length, heads, size).transpose(1, 2)


def _from_zero(q: Tensor) -> Tensor:
    return torch.zeros(q.shape[0], q.shape[2], dtype=torch.int32)


def _native_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    kinds = {q.dtype, k.dtype, v.dtype}
    return (
        not torch.compiler.is_compiling()  # the compiler sees through torch's own attention only
        and q.device.type == "cpu"
        and len(kinds) == 1
        and q.dtype in (torch.float32, torch.bfloat16)
        and q.shape[3] % 16 == 0
        and q.shape[2] > 1
        and library() is not None
    )


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, firsts: Tensor) -> Tensor:
        batch, heads, length, size = q.shape
        out = torch.empty(batch, length, heads, size, dtype=q.dtype, device=q.device).transpose(1, 2)
        log_sums = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
        _call(q, k, firsts, log_sums, [q, k, v, out], backward=False)
        ctx.save_for_backward(q, k, v, out, log_sums, firsts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, log_sums, firsts = ctx.saved_tensors
        slopes = [
            torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            for t in (q, k, v)
        ]
        _call(q, k, firsts, log_sums, [q, k, v, out, d_out, *slopes], backward=True)
        return slopes[0], slopes[1], slopes[2], None


def _call(q: Tensor, k: Tensor, firsts: Tensor, log_sums: Tensor, tensors: list[Tensor], backward: bool) -> None:
    """Outputs among `tensors` must have a contiguous last dimension already; inputs are made so."""
    if isinstance(q, FakeTensor):  # a plan asks what would be kept; there is nothing to compute
        return
    native = library()
    assert native is not None
    kept = [t if t.stride(3) == 1 else t.contiguous() for t in tensors]
    described = [x for t in kept for x in (t.data_ptr(), *t.stride()[:3], int(t.dtype == torch.bfloat16))]
    batch, heads, length, size = q.shape
    shape, firsts = (ctypes.c_int64 * 5)(batch, heads, k.shape[1], length, size), firsts.contiguous()
    native.camelid_attention(
        shape,
        ctypes.c_float(size**-0.5),
        (ctypes.c_int64 * len(described))(*described),
        ctypes.c_void_p(firsts.data_ptr()),
        ctypes.c_void_p(log_sums.data_ptr()),
        ctypes.c_int(backward),
        ctypes.c_int(torch.get_num_threads()),
    )
