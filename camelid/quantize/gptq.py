"""GPTQ (arXiv:2210.17323): round a weight column by column, and let the columns that are left make up for each error,
by what the layer's inputs say about how columns go together.

Differs from the paper's algorithm 1 in two ways that its authors' code has too: columns go in the order of their
inputs' size (act-order), and scales are those of the untouched weight (static groups), so a group's columns stay
together in the file whatever their order here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from camelid.errors import CamelidError
from camelid.model.llama import Llama
from camelid.model.quantized import Integers, QuantizedLinear, round_to_nearest
from camelid.model.rope import rotation

DAMP = 0.01  # of the mean squared input, added to each: the paper's, section 3.3
COLUMNS = 128  # between updates of all columns to the right
# Layers of a block that share their input.
INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def round_by_gptq(weight: Tensor, gram: Tensor, bits: int, group: int, symmetric: bool = True) -> Integers:
    """A weight [out, in] rounded for inputs x with sum x x^T = gram, float64 or float32 [in, in]."""
    nearest = round_to_nearest(weight, bits, group, symmetric)
    scale = nearest.scale.float().repeat_interleave(group, 1)
    middle = float(2 ** (bits - 1))
    zero = torch.full_like(scale, middle) if nearest.zero is None else nearest.zero.float().repeat_interleave(group, 1)
    order = gram.diagonal().argsort(descending=True, stable=True)
    left = weight.detach().float()[:, order].clone()
    scale, zero = scale[:, order], zero[:, order]
    upper = _inverse_factor(gram[order][:, order])
    q = torch.empty_like(left)
    for start in range(0, left.shape[1], COLUMNS):
        end = min(start + COLUMNS, left.shape[1])
        errors = torch.empty_like(left[:, start:end])
        for column in range(start, end):
            s, z, w = scale[:, column], zero[:, column], left[:, column]
            q[:, column] = (w / s).round_().add_(z).clamp_(0, 2**bits - 1)
            error = (w - (q[:, column] - z) * s) / upper[column, column]
            left[:, column + 1 : end] -= error[:, None] * upper[column, column + 1 : end]
            errors[:, column - start] = error
        left[:, end:] -= errors @ upper[start:end, end:]
    back = torch.empty_like(q, dtype=torch.uint8)
    back[:, order] = q.to(torch.uint8)
    return Integers.of(back, nearest.scale, nearest.zero, bits)


def check_inputs(gram: Tensor) -> None:
    """Raises CamelidError for inputs that are not numbers."""
    if not gram.isfinite().all():
        raise CamelidError("a layer's inputs are not finite on the calibration text: its weights are damaged")


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of (gram + damping)^-1, float32."""
    check_inputs(gram)
    wide = gram.double()
    mean = wide.diagonal().mean()
    damped = wide + torch.eye(len(wide), dtype=torch.float64) * (DAMP * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


@torch.inference_mode()
def quantize_by_gptq(
    model: Llama, windows: Sequence[Sequence[int]], bits: int, group: int | None, symmetric: bool = True,
    advance: Callable[[float, str], None] = lambda done, note: None,
) -> None:  # fmt: skip
    """Round a Llama's layers in place, one after the other, each for what the rounded ones before it give on `windows`,
    token ids of any length. `advance` is told how many layers are done."""
    states = [model.embed_tokens(torch.tensor([list(window)])) for window in windows]
    turns = [rotation(model.config, torch.arange(s.shape[1])) for s in states]
    for number, layer in enumerate(model.layers):
        grams = {names[0]: Gram(linear_named(layer, names[0])) for names in INPUTS}
        try:
            for state, turn in zip(states, turns, strict=True):
                layer(state, turn)
        finally:
            for gram in grams.values():
                gram.finish()
        for names in INPUTS:
            together = grams[names[0]].total
            for name in names:
                linear = linear_named(layer, name)
                weight = round_by_gptq(linear.weight, together, bits, group or linear.in_features, symmetric)
                bias = None if linear.bias is None else linear.bias.detach()
                parent = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
                setattr(parent, name, QuantizedLinear(weight, bias, linear.weight.dtype, rounds_inputs=True))
        states = [layer(state, turn) for state, turn in zip(states, turns, strict=True)]
        advance(number + 1, "layers")


def linear_named(layer: nn.Module, name: str) -> nn.Linear:
    """A block's linear layer by its own name."""
    found = getattr(layer.self_attn, name, None) or getattr(layer.mlp, name)
    assert isinstance(found, nn.Linear)
    return found


class Gram:
    """`total`, float32 [in, in], adds up x x^T of all inputs of a linear layer until `finish`."""

    def __init__(self, linear: nn.Linear) -> None:
        self.total = torch.zeros(linear.in_features, linear.in_features)
        self._hook = linear.register_forward_pre_hook(self._add)

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        flat = inputs[0].flatten(0, -2).float()
        self.total.addmm_(flat.T, flat)

    def finish(self) -> None:
        self._hook.remove()
