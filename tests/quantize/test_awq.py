"""Scaling before rounding: the model computes the same, its originals stay, and rounding then costs less where some
inputs are much larger than others."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from camelid.model.block import Block
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.quantized import quantize_layers, round_to_nearest
from camelid.quantize.awq import best_scale, input_sets, scale_for_rounding
from camelid.quantize.measure import shared_copy

WINDOWS = [list(range(5, 45)), list(range(200, 290))]


def model_of(kv_heads: int = 4, **changes: bool) -> Llama:
    """Weights in which a few channels are much larger than the others, as trained models have them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, **changes,
    )  # fmt: skip
    model = Llama(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.data.mul_(3)
        elif "norm" in name:
            weight.data.copy_(torch.rand_like(weight) + 0.5)
            weight.data[:3] *= 20
        else:
            weight.data.normal_(0, 0.3)
    return model.requires_grad_(False)


def logits(model: Llama) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([window])).logits[0] for window in WINDOWS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "make", [model_of, lambda: model_of(2), lambda: model_of(4, attention_bias=True, mlp_bias=True)],
    ids=["plain", "grouped", "biases"],
)  # fmt: skip
def test_the_same_function_and_norms_that_the_file_holds(make: Callable[[], Llama], dtype: torch.dtype) -> None:
    model = make()
    if dtype == torch.bfloat16:  # what such a file holds
        for weight in model.parameters():
            weight.data = weight.data.bfloat16().float()
    before, first = logits(model), copy.deepcopy(model.state_dict())
    scaled = shared_copy(model)
    scale_for_rounding(scaled, WINDOWS, 4, 32, True, dtype)
    after = logits(scaled)
    assert float((after - before).norm() / before.norm()) < 1e-5
    assert all(torch.equal(t, first[name]) for name, t in model.state_dict().items())
    changed = [name for name, t in scaled.state_dict().items() if not torch.equal(t, first[name])]
    grouped = model.config.kv_heads != model.config.num_attention_heads
    assert any("input_layernorm" in name for name in changed)
    assert any("o_proj" in name for name in changed) != grouped
    for layer in scaled.layers:
        assert isinstance(layer, Block)
        assert torch.equal(layer.input_layernorm.weight, layer.input_layernorm.weight.to(dtype).float())


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_costs_less_afterwards(symmetric: bool) -> None:
    model = model_of()
    wanted = logits(model)

    def error(scales: bool) -> float:
        rounded = shared_copy(model)
        if scales:
            scale_for_rounding(rounded, WINDOWS, 4, 32, symmetric)
        quantize_layers(rounded, 4, 32, symmetric)
        return float((logits(rounded) - wanted).norm())

    assert error(True) < 0.8 * error(False)


def test_the_error_that_is_judged_is_the_error_over_the_inputs() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 64, generator=generator)
    x[:, [3, 40]] *= 30
    weight = torch.randn(20, 64, generator=generator)
    scale = best_scale([weight], x.T @ x, 4, 32, True)
    assert set(scale.topk(2).indices.tolist()) == {3, 40}

    def error(by: Tensor) -> float:
        return float((x @ (round_to_nearest(weight * by, 4, 32).dense() / by - weight).T).norm())

    assert error(scale) < 0.7 * error(torch.ones(64))


def test_alike_inputs_need_no_scale() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(best_scale([weight], torch.eye(64), 4, 32, True), torch.ones(64))


def test_every_layer_is_scaled_at_most_once_by_each_side() -> None:
    layer = model_of().layers[0]
    assert isinstance(layer, Block)
    sets = input_sets(layer, True)
    names = [name for group, _ in sets for name in group]
    assert sorted(names) == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    assert all(isinstance(giver, nn.Module) for _, giver in sets)
