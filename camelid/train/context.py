"""One sequence over several processes, as in DeepSpeed-Ulysses (arXiv:2309.14509): each holds a stretch of every row,
and for attention tokens are exchanged for heads: a process sees whole rows, for its share of the heads.

So every kernel and every mask of packed documents is what it is in one process, and all have the same work. What
travels is a layer's queries, keys, values and outputs, and their gradients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from camelid.kernels.attention import Mask, attention
from camelid.model.attention import Attend
from camelid.model.llama import Llama
from camelid.tokens.batch import Batch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def spread_attention(model: Llama, count: int, group: ProcessGroup | None) -> None:
    """Let the model's layers, each fed a stretch of every row, attend over whole rows, with the `count` processes of
    the group; without one, what they would send is only laid out."""
    for layer in model.layers:
        block: Any = layer
        block.self_attn.attend = across(count, group)


def across(count: int, group: ProcessGroup | None) -> Attend:
    """`attention` of stretches [batch, heads, seq / processes, head_dim] in the order of the group's ranks; the mask is
    of whole rows."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        q, k, v = (_Exchange.apply(t, count, group, True) for t in (q, k, v))  # type: ignore[no-untyped-call]
        out: Tensor = _Exchange.apply(attention(q, k, v, mask), count, group, False)  # type: ignore[no-untyped-call]
        return out

    eager: Attend = torch.compiler.disable(attend)  # type: ignore[no-untyped-call]
    return eager


class _Exchange(torch.autograd.Function):
    """Tokens for heads: [batch, heads, stretch, head_dim] -> [batch, heads / processes, seq, head_dim], or back. Each
    is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, group: ProcessGroup | None, gather: bool) -> Tensor:
        ctx.count, ctx.group, ctx.gather = count, group, gather
        return _exchange(x, count, group, gather)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(slope, ctx.count, ctx.group, not ctx.gather), None, None, None


def _exchange(x: Tensor, count: int, group: ProcessGroup | None, gather: bool) -> Tensor:
    from torch import distributed

    axis = 1 if gather else 2  # of what is given away; the other one is what is received
    parts = torch.stack(x.chunk(count, dim=axis))
    received = torch.empty_like(parts)
    if group is not None:
        distributed.all_to_all_single(received, parts, group=group)
    return torch.cat(received.unbind(), dim=3 - axis)


def stretch(batch: Batch, number: int, count: int) -> Batch:
    """The part of every row that process `number` of `count` reads. Documents stay those of whole rows."""
    if count == 1:
        return batch
    length = batch.input_ids.shape[1] // count
    own = slice(number * length, (number + 1) * length)
    return replace(batch, input_ids=batch.input_ids[:, own], labels=batch.labels[:, own], begins=own.start)
