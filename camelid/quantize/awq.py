"""Activation-aware scaling (AWQ, arXiv:2306.00978): before rounding, columns of a weight whose inputs are large are
made larger, and what gives those inputs is made smaller by as much. The model computes the same; rounding then hits the
columns that matter less. What is left is a plain model, so the folder needs no word for it.

Differs from the authors' code in how a scale is judged: by the error over all inputs, from their products (GPTQ's
`gram`), not by running a layer; and in that what a norm cannot hold in the file's dtype is left to the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from camelid.model.block import Block
from camelid.model.llama import Llama
from camelid.model.quantized import round_to_nearest
from camelid.model.rope import rotation
from camelid.quantize.gptq import Gram, check_inputs, linear_named

STEPS = 20  # exponents tried, from 0 (no scaling) on: the authors'
ROWS = 512  # of each weight, or up to twice that, evenly taken, that an exponent is judged by


@torch.inference_mode()
def scale_for_rounding(
    model: Llama, windows: Sequence[Sequence[int]], bits: int, group: int | None, symmetric: bool = True,
    dtype: torch.dtype = torch.float32, advance: Callable[[float, str], None] = lambda done, note: None,
) -> None:  # fmt: skip
    """Give a Llama weights that compute the same and round better, for its inputs on `windows` of token ids. Parameters
    are replaced, not changed. Norms stay representable in `dtype`. `advance` is told how many layers are done."""
    states = [model.embed_tokens(torch.tensor([list(window)])) for window in windows]
    turns = [rotation(model.config, torch.arange(s.shape[1])) for s in states]
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        sets = input_sets(layer, model.config.num_attention_heads == model.config.kv_heads)
        grams = {names[0]: Gram(linear_named(layer, names[0])) for names, _ in sets}
        try:
            states = [layer(state, turn) for state, turn in zip(states, turns, strict=True)]
        finally:
            for gram in grams.values():
                gram.finish()
        for names, giver in sets:
            linears = [linear_named(layer, name) for name in names]
            total = grams[names[0]].total
            check_inputs(total)
            scale = best_scale([x.weight for x in linears], total, bits, group, symmetric)
            fold(linears, giver, scale, dtype)
        advance(number + 1, "layers scaled")


def input_sets(layer: Block, own_values: bool) -> list[tuple[tuple[str, ...], nn.Module]]:
    """Layers that share their input, and what gives it. Where several query heads read one head's values, o_proj's
    inputs come more than once from one row of v_proj, which has one scale only: it is left out."""
    sets: list[tuple[tuple[str, ...], nn.Module]] = [(("down_proj",), layer.mlp.up_proj)]
    if own_values:
        sets.append((("o_proj",), linear_named(layer, "v_proj")))
    sets.append((("q_proj", "k_proj", "v_proj"), layer.input_layernorm))
    sets.append((("gate_proj", "up_proj"), layer.post_attention_layernorm))
    return sets


def best_scale(weights: Sequence[Tensor], gram: Tensor, bits: int, group: int | None, symmetric: bool) -> Tensor:
    """For each input column the factor, a power of its size, that leaves the least error over the inputs whose sum of
    x x^T is `gram`: float32 [in]; ones when no scaling is better."""
    size = gram.diagonal().clamp_min(0).sqrt()
    size = (size / size.max().clamp_min(1e-30)).clamp_min(1e-4)
    sampled = [w[:: max(1, len(w) // ROWS)].float() for w in weights]
    best, least = torch.ones_like(size), float("inf")
    for step in range(STEPS):
        scale = size ** (step / STEPS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for weight in sampled:
            rounded = round_to_nearest(weight * scale, bits, group or weight.shape[1], symmetric).dense() / scale
            off = rounded - weight
            error += float((off @ gram).mul_(off).sum())
        if error < least:
            best, least = scale, error
    return best


def fold(linears: Sequence[nn.Linear], giver: nn.Module, scale: Tensor, dtype: torch.dtype) -> None:
    """Columns times `scale`, what gives them divided by it."""
    before = giver.weight
    assert isinstance(before, Tensor)
    if isinstance(giver, nn.Linear):
        giver.weight = _parameter(before / scale[:, None])
        if giver.bias is not None:
            giver.bias = _parameter(giver.bias / scale)
    else:
        smaller = (before.float() / scale).to(dtype).to(before.dtype)
        kept = smaller != 0
        scale = torch.where(kept, before.float() / smaller, 1.0)
        giver.weight = _parameter(torch.where(kept, smaller, before))
    for linear in linears:
        linear.weight = _parameter(linear.weight * scale)


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
