"""GPTQ beside rounding to nearest, and its two limits: inputs that say nothing, and inputs that say it all."""

from __future__ import annotations

import copy

import pytest
import torch

from camelid.errors import CamelidError
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.quantized import QuantizedLinear, quantize_layers, round_to_nearest
from camelid.quantize.gptq import quantize_by_gptq, round_by_gptq


def inputs(count: int = 400, size: int = 96) -> torch.Tensor:
    """Inputs whose columns go together, as a model's do."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(count, 12, generator=generator) @ torch.randn(12, size, generator=generator)
    return mixed + 0.3 * torch.randn(count, size, generator=generator)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_outputs_are_nearer_than_with_rounding(bits: int, symmetric: bool) -> None:
    x, weight = inputs(), torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    ours = round_by_gptq(weight, x.T @ x, bits, 32, symmetric)
    nearest = round_to_nearest(weight, bits, 32, symmetric)
    assert torch.equal(ours.scale, nearest.scale)
    wanted = x @ weight.T
    errors = [(x @ found.dense().T - wanted).norm() for found in (ours, nearest)]
    assert errors[0] < 0.6 * errors[1]


def test_inputs_that_do_not_go_together_leave_rounding_to_nearest() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    gram = torch.diag(torch.rand(64) + 0.5)
    assert torch.equal(round_by_gptq(weight, gram, 4, 32).q, round_to_nearest(weight, 4, 32).q)


def test_the_first_column_is_made_up_for_by_the_others() -> None:
    """Two columns that always come together: what one is rounded off, the other takes over, as far as its steps
    allow."""
    weight = torch.tensor([[0.35, 0.35] + [1.0] * 30])
    x = torch.ones(10, 32)
    x[:, 2:] = 0
    found = round_by_gptq(weight, x.T @ x, 4, 32).dense()
    step = float(round_to_nearest(weight, 4, 32).scale)
    assert abs(float(found[0, :2].sum()) - 0.7) <= step / 2 * 1.02
    assert abs(float(round_to_nearest(weight, 4, 32).dense()[0, :2].sum()) - 0.7) > step / 2


def test_a_whole_model_is_nearer_than_with_rounding() -> None:
    torch.manual_seed(0)
    model = Llama(
        LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
    )
    for weight in model.parameters():
        weight.data.mul_(4) if weight.dim() > 1 else None
    ids = torch.randint(0, 30, (8, 64))  # text of few words, so that inputs go together
    full = model.eval().requires_grad_(False)
    by_gptq, nearest = copy.deepcopy(full), copy.deepcopy(full)
    done: list[float] = []
    quantize_by_gptq(by_gptq, ids[:6].tolist(), 4, 32, advance=lambda n, _: done.append(n))
    quantize_layers(nearest, 4, 32)
    assert done == [1, 2, 3]
    assert all(isinstance(layer.mlp.down_proj, QuantizedLinear) for layer in by_gptq.layers)
    with torch.inference_mode():
        errors = [(m.hidden(ids[6:]) - full.hidden(ids[6:])).norm() for m in (by_gptq, nearest)]
    assert errors[0] < 0.9 * errors[1]


def test_damaged_weights_are_named() -> None:
    gram = torch.eye(64)
    gram[3, 3] = torch.nan
    with pytest.raises(CamelidError, match="not finite"):
        round_by_gptq(torch.randn(8, 64), gram, 4, 32)
