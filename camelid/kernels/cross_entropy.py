"""The output projection and cross-entropy in one, by chunks: there is never a [tokens, vocab] tensor.

The gradient is made in the forward pass, while a chunk's logits are at hand: softmax(logits) - onehot(label), times the
states and times the weight. The backward pass only scales it. With z-loss (PaLM, arXiv:2204.02311, section 5) each
token also costs z * logsumexp^2, which keeps logits from drifting.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from camelid.kernels import elementwise
from camelid.kernels.precision import product_dtype
from camelid.kernels.products import Weight, by_both, by_columns, by_rows, ready

# Of a chunk's logits. Each chunk costs passes over the whole weight, which our own products lay out anew, and over its
# gradient; where the projection learns nothing there is no gradient, and chunks are so many times smaller.
CHUNK_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
FROZEN = {"cpu": 4, "cuda": 2}
ALIKE = 32  # rows of a chunk are a multiple of it
SCALED_AT_ONCE = 4096  # rows that are widened for it


def linear_cross_entropy(states: Tensor, weight: Weight, labels: Tensor, z_loss: float = 0.0) -> Tensor:
    """Sum over tokens of -log softmax(states @ weight.T)[label], plus the z-loss: a scalar, float32 (float64 for
    float64 states).

    states [tokens, hidden], weight [vocab, hidden], labels int64 [tokens], all supervised. Under autocast products are
    in its dtype; softmax and sums are float32. Gradients have the dtypes of states and weight; a weight in bytes has
    none.
    """
    product = product_dtype(states)
    if not torch.is_grad_enabled() or not (states.requires_grad or _learned(weight) is not None):
        return _forward(states, weight, labels, z_loss, product, None, None)
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        states, weight, labels, z_loss, product
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Weight, labels: Tensor, z_loss: float, product: torch.dtype
    ) -> Tensor:
        d_states = torch.empty_like(states) if states.requires_grad else None
        learned = _learned(weight)
        d_weight = None if learned is None else _like(learned, states)
        loss = _forward(states, weight, labels, z_loss, product, d_states, d_weight)
        ctx.save_for_backward(d_states, d_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        d_states, d_weight = (None if g is None else _scale_(g, scale) for g in ctx.saved_tensors)
        return d_states, d_weight, None, None, None


def _learned(weight: Weight) -> Tensor | None:
    return weight if isinstance(weight, Tensor) and weight.requires_grad else None


def _like(weight: Tensor, states: Tensor) -> Tensor:
    """Room for a weight's gradient, which the first chunk fills; zeros where there is none."""
    return torch.empty_like(weight) if len(states) else torch.zeros_like(weight)


def _scale_(values: Tensor, scale: Tensor) -> Tensor:
    """values * scale in place. One over the number of tokens, rounded to bfloat16, would be off by up to 0.2 %."""
    if values.dtype == scale.dtype:
        return values.mul_(scale)
    for at in range(0, len(values), SCALED_AT_ONCE):
        part = values[at : at + SCALED_AT_ONCE]
        part.copy_(part.to(scale.dtype).mul_(scale))
    return values


def _forward(
    states: Tensor,
    weight: Weight,
    labels: Tensor,
    z_loss: float,
    product: torch.dtype,
    d_states: Tensor | None,
    d_weight: Tensor | None,
) -> Tensor:
    """The loss; fills `d_states` and `d_weight` where they are given."""
    wide = torch.float64 if states.dtype == torch.float64 else torch.float32
    gradient = d_states is not None or d_weight is not None
    total = torch.zeros((), dtype=wide, device=states.device)
    with torch.autocast(states.device.type, enabled=False):
        cast = ready(weight, product)
        for at, chunk, filled in _chunks(states, cast, product, d_weight is None):
            wanted = labels[at]
            logits = filled[: len(wanted)]
            chosen = logits.gather(1, wanted[:, None]).squeeze(1).to(wide)
            log_sum = elementwise.softmax_gradient_(logits, wanted, z_loss, gradient)
            total += (log_sum - chosen + z_loss * log_sum.square()).sum()
            if d_states is not None:
                d_states[at] = by_columns(filled, cast)[: len(wanted)]
            if d_weight is not None:
                by_both(filled, chunk, d_weight, add=at.start > 0)
    return total


def linear_log_probs(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """log softmax(states @ weight.T)[label] of each token, float32 (float64 for float64 states): [tokens].

    For losses that weigh tokens by what comes out; shapes and arithmetic as in `linear_cross_entropy`. The backward
    pass computes the logits again, chunk by chunk, instead of keeping them.
    """
    product = product_dtype(states)
    log_probs: Tensor = _LinearLogProbs.apply(states, weight, labels, product)  # type: ignore[no-untyped-call]
    return log_probs


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, labels: Tensor, product: torch.dtype) -> Tensor:
        ctx.save_for_backward(states, weight, labels)
        ctx.product = product
        wide = torch.float64 if states.dtype == torch.float64 else torch.float32
        found = torch.empty(len(states), dtype=wide, device=states.device)
        with torch.autocast(states.device.type, enabled=False):
            cast = ready(weight, product)
            for at, _, filled in _chunks(states, cast, product, frozen=True):
                wanted = labels[at]
                logits = filled[: len(wanted)]
                chosen = logits.gather(1, wanted[:, None]).squeeze(1).to(wide)
                found[at] = chosen - elementwise.softmax_gradient_(logits, wanted, gradient=False)
        return found

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        states, weight, labels = ctx.saved_tensors
        d_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        d_weight = _like(weight, states) if ctx.needs_input_grad[1] else None
        with torch.autocast(states.device.type, enabled=False):
            cast = ready(weight, ctx.product)
            for at, chunk, filled in _chunks(states, cast, ctx.product, d_weight is None):
                wanted = labels[at]
                logits = filled[: len(wanted)]
                elementwise.softmax_gradient_(logits, wanted)
                logits.mul_(-slope[at, None].to(logits.dtype))
                if d_states is not None:
                    d_states[at] = by_columns(filled, cast)[: len(wanted)].to(d_states.dtype)
                if d_weight is not None:
                    by_both(filled, chunk, d_weight, add=at.start > 0)
        return d_states, d_weight, None, None


def _chunks(
    states: Tensor, weight: Weight, product: torch.dtype, frozen: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The places of each chunk's tokens, their states in `product`, and their logits, all chunks' in the same
    memory.

    Both are filled up with rows of zeros to a multiple of ALIKE, all chunks to the same: oneDNN keeps what it made for
    each shape it meets, and steps that each have another number of tokens would add to that for ever, amid the blocks
    of a step, which then fit nowhere.
    """
    device = states.device
    size = CHUNK_BYTES.get(device.type, 1 << 27) // (FROZEN.get(device.type, 2) if frozen else 1)
    most = max(1, size // (len(weight) * product.itemsize))
    alike = 1 if device.type == "cuda" else min(ALIKE, most)  # there torch keeps blocks apart by itself
    most = most // alike * alike
    count = max(1, -(-len(states) // most))
    rows = -(-len(states) // (count * alike)) * alike
    room = torch.empty(rows, len(weight), dtype=product, device=device)
    for at in range(0, len(states), max(rows, 1)):
        chunk = states[at : at + rows].to(product)
        if len(chunk) < rows:
            chunk = torch.nn.functional.pad(chunk, (0, 0, 0, rows - len(chunk)))
        yield slice(at, at + rows), chunk, by_rows(chunk, weight, out=room)
