"""Products in float8: what the format's own rounding costs, and nothing more. A CPU has the same products, slowly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from camelid.kernels import float8
from camelid.kernels.cross_entropy import linear_cross_entropy
from camelid.model.config import LlamaConfig
from camelid.model.linear import Linear, use_float8
from camelid.model.llama import Llama
from camelid.model.rope import rotation
from camelid.recipe import TrainSection
from camelid.train.rehearse import Live, step_memory

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def kept(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What is left of a tensor after rounding, float64."""
    narrow, scale = float8.narrowed(x.detach(), dtype)
    return narrow.double() * scale.double()


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_and_its_gradients(device: torch.device) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 64, device=device, requires_grad=True)
    x = (3 * torch.randn(2, 24, 64, device=device)).bfloat16().requires_grad_()
    slope = (1e-4 * torch.randn(2, 24, 96, device=device)).bfloat16()
    out = float8.linear(x, weight)
    out.backward(slope.transpose(0, 1).contiguous().transpose(0, 1))  # laid out otherwise
    assert out.dtype == torch.bfloat16
    assert x.grad is not None
    assert weight.grad is not None
    narrow_x, narrow_weight = kept(x, float8.FORWARD).flatten(0, 1), kept(weight, float8.FORWARD)
    narrow_slope = kept(slope, float8.BACKWARD).flatten(0, 1)
    # A product of rounded factors, rounded to bfloat16 where it goes on; a weight's gradient is not rounded.
    bound = 1e-5 if device == CPU else 5e-3  # a GPU's own sums keep fewer bits
    assert far(out.flatten(0, 1), narrow_x @ narrow_weight.T) < 4e-3 + bound
    assert far(x.grad.flatten(0, 1), narrow_slope @ narrow_weight) < 4e-3 + bound
    assert weight.grad.dtype == torch.float32
    assert far(weight.grad, narrow_slope.T @ narrow_x) < bound
    assert 0.01 < far(out.flatten(0, 1), x.detach().double().flatten(0, 1) @ weight.detach().double().T) < 0.06


def test_any_number_of_rows() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(32, 64, requires_grad=True), torch.randn(5, 3, 64).bfloat16()
    slope = torch.randn(5, 3, 32).bfloat16()
    found = []
    for rows in (x, torch.cat((x, torch.zeros(11, 3, 64, dtype=x.dtype)))):
        leaf = rows.clone().requires_grad_()
        out = float8.linear(leaf, weight)
        out[:5].backward(slope)
        assert leaf.grad is not None
        found.append((out[:5].detach(), leaf.grad[:5]))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def learned(part: Any, x: Tensor) -> list[Tensor]:
    """What a part of a layer makes of x, and the gradients of its matrices."""
    for weight in part.parameters():
        weight.grad = None
    out = part(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in part.parameters())]


def test_factors_that_lie_otherwise() -> None:
    torch.manual_seed(0)
    weight, x, slope = torch.randn(64, 32).T, torch.randn(64, 48).T.bfloat16(), torch.randn(32, 48).T.bfloat16()
    found = []
    for w, given, along in ((weight, x, slope), (weight.contiguous(), x.contiguous(), slope.contiguous())):
        leaves = w.detach().requires_grad_(), given.detach().requires_grad_()
        out = float8.linear(leaves[1], leaves[0])
        out.backward(along)
        found.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_rounding_takes_the_whole_range_and_hides_nothing() -> None:
    for size in (1e-27, 1e-9, 1.0, 1e30):
        narrow, scale = float8.narrowed(torch.tensor([size, -size / 2, 0.0]), float8.FORWARD)
        assert narrow.float().tolist() == [448.0, -224.0, 0.0]
        assert float(scale) == pytest.approx(size / 448)
    assert not kept(torch.zeros(3), float8.FORWARD).any()
    for bad in (torch.nan, torch.inf):
        assert bool(kept(torch.tensor([1.0, bad]), float8.FORWARD).isnan().any())


def test_only_large_layers_that_learn_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    torch.manual_seed(0)
    model = Llama(config)
    assert use_float8(model) == 0
    monkeypatch.setattr("camelid.model.linear.WORTH", 64)
    assert use_float8(model) == 2 * 5  # keys and values are 32 wide
    ids = torch.randint(0, 300, (2, 32))
    plain = Llama(config)
    plain.load_state_dict(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            assert torch.equal(model.hidden(ids), plain.hidden(ids))
        found, wanted = model.hidden(ids), plain.hidden(ids)
        assert 1e-3 < far(found, wanted.double()) < 0.1
        torch._dynamo.reset()
        torch.compile(model.layers[0], fullgraph=True, backend="eager")(
            torch.randn(2, 13, 64), rotation(config, torch.arange(13))
        )
    x = torch.randn(2, 13, 64).bfloat16()
    narrow_one, usual_one = (m.layers[0].mlp.up_proj for m in (model, plain))
    whole = torch.compile(narrow_one, fullgraph=True, backend="aot_eager")
    found, own, usual = (learned(part, x) for part in (whole, narrow_one, usual_one))
    for compiled, eager, narrow in zip(found, own, usual, strict=True):
        assert far(compiled, eager.double()) < 1e-6
        assert far(narrow, eager.double()) > 0.02
    biased = Linear(64, 64)
    biased.in_float8 = True
    x = torch.randn(16, 64)
    torch.testing.assert_close(biased(x) - float8.linear(x, biased.weight), biased.bias.bfloat16().expand(16, 64),
                               atol=0.02, rtol=0)  # fmt: skip


def test_a_plan_rehearses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("camelid.model.linear.WORTH", 64)
    settings = TrainSection(dtype="bfloat16", sequence_length=64)
    model = Llama(LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=256, num_hidden_layers=8,
                              num_attention_heads=4))  # fmt: skip
    use_float8(model)
    ids = torch.zeros(4, 64, dtype=torch.int64)
    with Live(model.parameters()) as live, torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(model.hidden(ids).flatten(0, 1), model.lm_head.weight, ids.flatten()).backward()  # type: ignore[no-untyped-call]
    assert step_memory(model, 4, 1, settings, CPU) == pytest.approx(live.peak, rel=0.03)
    plain = step_memory(Llama(model.config), 4, 1, settings, CPU)
    assert step_memory(model, 4, 1, settings, CPU) != pytest.approx(plain, rel=0.003)
