"""Weights as small integers: no weight is further from its step than the docstring says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from camelid.model.quantized import quantized, round_to_nearest


@given(st.integers(0, 2**31), st.sampled_from([4, 8]), st.booleans(), st.sampled_from([0.0, -3.0, 0.5, 100.0]))
def test_no_weight_is_off_by_more_than_half_a_step(seed: int, bits: int, symmetric: bool, shift: float) -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) + shift
    found = round_to_nearest(weight, bits, 32, symmetric)
    steps = found.scale.float().repeat_interleave(32, 1)
    off = (found.dense() - weight).abs() / steps
    assert float(off.max()) <= (0.5 if symmetric else 1.0) + 1e-3


def test_a_frozen_layer_keeps_nothing_wide_for_the_backward_pass() -> None:
    torch.manual_seed(0)
    layer = quantized(torch.nn.Linear(64, 96), 4, 32, symmetric=False, rounds_inputs=False)
    x, kept = torch.randn(3, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = layer(x)
    slope = torch.randn_like(out)
    out.backward(slope)
    assert not kept
    torch.testing.assert_close(out, x @ layer.dense().T + layer.bias)
    torch.testing.assert_close(x.grad, slope @ layer.dense())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_zero_of_its_own_halves_the_step_of_weights_above_nought(bits: int) -> None:
    weight = torch.rand(2, 64, generator=torch.Generator().manual_seed(0))
    symmetric, own = (round_to_nearest(weight, bits, 32, how).scale.float() for how in (True, False))
    assert bool((own < 0.55 * symmetric).all())
