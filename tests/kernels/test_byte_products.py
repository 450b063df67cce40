"""Products with a frozen weight of bytes against what they are said to be, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from camelid.kernels import byte_products
from camelid.kernels.byte_products import BLOCK, Bytes
from camelid.kernels.cross_entropy import linear_cross_entropy
from camelid.kernels.precision import native_dtype
from camelid.model.config import LlamaConfig
from camelid.model.grow import grow_embeddings
from camelid.model.llama import Llama
from camelid.model.quantized import QuantizedLinear, multiply_head_in_bytes, quantize_layers, quantized

native = pytest.mark.skipif(not byte_products._there(), reason="this CPU does not multiply bytes, or has AMX")


def weight_of(out: int, size: int) -> tuple[Bytes, Tensor]:
    """A weight in bytes, and as it is, float64."""
    drawn = torch.Generator().manual_seed(out * size)
    q = torch.randint(0, 256, (out, size), dtype=torch.uint8, generator=drawn)
    scale = torch.rand(out, generator=drawn) + 0.01
    return Bytes(q, scale), (q.double() - 128) * scale[:, None].double()


def states_of(rows: int, size: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers, a few of them large: a step of a whole row would drown the others."""
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(rows + size))
    x[:, ::97] *= 50
    return x.to(dtype)


def rounded(x: Tensor) -> Tensor:
    """What is multiplied, float64: whole steps of each block's 127th part."""
    padded = F.pad(x.float(), (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    most = padded.abs().amax(-1, keepdim=True)
    times = torch.full_like(most, 127) / most  # 127 / most would be 127 times a rounded 1 / most
    return ((padded * times).round_().double() * (most / 127).double()).flatten(1)[:, : x.shape[1]]


def check(rows: int, out: int, size: int, dtype: torch.dtype) -> None:
    weight, whole = weight_of(out, size)
    x, slope = states_of(rows, size, dtype), states_of(rows, out, dtype)
    for found, wanted in (
        (weight.by_rows(x), rounded(x) @ whole.T),
        (weight.by_columns(slope), rounded(slope.float() * weight.scale) @ (weight.q.double() - 128)),
    ):
        allowed = wanted.abs() * (2**-8 if dtype == torch.bfloat16 else 0) + 1e-5 * wanted.square().mean().sqrt()
        assert found.dtype == dtype
        assert bool(((found.double() - wanted).abs() <= allowed).all())


@native
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 150), st.integers(1, 300), st.sampled_from([torch.float32, torch.bfloat16]))
def test_products_of_any_shape(rows: int, out: int, size: int, dtype: torch.dtype) -> None:
    check(rows, out, size, dtype)


@native
@pytest.mark.parametrize("shape", [(500, 2100, 4099), (33, 4099, 2048), (700, 97, 1024)])
def test_products_in_several_parts(shape: tuple[int, int, int]) -> None:
    """More columns and rows than go at once."""
    check(*shape, torch.bfloat16)


@native
def test_the_same_bits_on_any_number_of_threads_and_beside_any_rows() -> None:
    weight, _ = weight_of(600, 300)
    x, before = states_of(90, 300, torch.float32), torch.get_num_threads()
    whole = weight.by_rows(x)
    torch.set_num_threads(3 if before != 3 else 2)
    try:
        assert torch.equal(weight.by_rows(x), whole)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(weight.by_rows(x[17:20]), whole[17:20])
    apart = torch.zeros(90, 400)
    apart[:, :300] = x
    assert torch.equal(weight.by_rows(apart[:, :300]), whole)
    assert torch.equal(weight.by_rows(x.T.contiguous().T), whole)


@native
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_number_stays_none(bad: float, dtype: torch.dtype) -> None:
    """The guard has to see it; other rows are what they were."""
    weight, _ = weight_of(40, 200)
    x = states_of(3, 200, dtype)
    clean = weight.by_rows(x)
    x[1, 130] = bad
    found = weight.by_rows(x)
    assert bool(found[1].isnan().all())
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    slope = states_of(3, 40, dtype)
    slope[2, 0] = bad
    assert bool(weight.by_columns(slope)[2].isnan().all())


@native
def test_zeros_and_nothing_at_all() -> None:
    weight, _ = weight_of(40, 200)
    assert not weight.by_rows(torch.zeros(2, 200)).any()
    assert weight.by_rows(torch.zeros(0, 200)).shape == (0, 40)
    with pytest.raises(ValueError, match="9 values a row do not meet"):
        weight.by_rows(torch.zeros(2, 9))
    with FakeTensorMode() as mode:
        x, fake = torch.empty(5, 200), Bytes(mode.from_tensor(weight.q), torch.empty(40))
        assert byte_products.takes(x)
        assert fake.by_rows(x).shape == (5, 40)


@native
def test_a_layer_multiplies_as_bytes_only_by_whole_rows_and_where_something_learns() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 64)
    x = torch.randn(40, 256, requires_grad=True)

    def product(layer: QuantizedLinear) -> tuple[Tensor, Tensor]:
        x.grad = None
        out = layer(x)
        out.square().sum().backward()
        assert x.grad is not None
        return out.detach(), x.grad.clone()

    for group, symmetric, native_ones in ((None, True, True), (None, False, False), (64, True, False)):
        layer = quantized(linear, 8, group, symmetric, rounds_inputs=False)
        out, slope = product(layer)
        exact = F.linear(x.detach(), layer.dense(), linear.bias.detach())
        off = float((out - exact).norm() / exact.norm())
        assert (1e-4 < off < 1e-2) if native_ones else off < 1e-6
        wanted = 2 * out @ layer.dense()
        assert float((slope - wanted).norm() / wanted.norm()) < (1e-2 if native_ones else 1e-6)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), exact)
    wide = quantized(linear.double(), 8, None, True, rounds_inputs=False)
    doubled = x.detach().double().requires_grad_()
    torch.testing.assert_close(wide(doubled), F.linear(doubled, wide.dense(), wide.bias))


@native
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_a_loss_over_an_output_projection_in_bytes(z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several chunks: the loss and the slopes of the rounded matrix, and nothing of the matrix itself is learned."""
    monkeypatch.setattr("camelid.kernels.cross_entropy.CHUNK_BYTES", {"cpu": 64 * 900 * 4})
    weight, whole = weight_of(900, 160)
    weight, whole = Bytes(weight.q, weight.scale / 1000), whole / 1000
    states = torch.randn(200, 160, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.arange(200) % 900
    loss = linear_cross_entropy(states, weight, labels, z_loss)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(states, weight, labels, z_loss), loss)
    loss.backward()
    logits = (rounded(states.detach()) @ whole.T).requires_grad_()
    wanted = F.cross_entropy(logits, labels, reduction="sum") + z_loss * logits.logsumexp(1).square().sum()
    wanted.backward()
    assert logits.grad is not None
    assert states.grad is not None
    slopes = rounded(logits.grad.float() * weight.scale) @ (weight.q.double() - 128)
    assert abs(float(loss) / float(wanted) - 1) < 1e-6
    assert float((states.grad - slopes).norm() / slopes.norm()) < 1e-4
    exact = logits.grad @ whole
    assert float((states.grad - exact).norm() / exact.norm()) < 3e-2  # small slopes beside a label's are lost


def test_an_output_projection_in_bytes_stands_beside_the_weight_where_a_device_multiplies_it() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config, cpu = LlamaConfig(vocab_size=96, **shape, tie_word_embeddings=True), torch.device("cpu")
    model = Llama(config)
    multiply_head_in_bytes(model, cpu)
    weight = model.embed_tokens.weight
    assert model.head is weight  # over a base that is not in bytes
    quantize_layers(model, 8, None, rounds_inputs=False)
    names = list(model.state_dict())
    multiply_head_in_bytes(model, torch.device("meta"))
    assert model.head is weight
    multiply_head_in_bytes(model, cpu)
    assert isinstance(model.head, Bytes) == byte_products.multiplies(cpu)
    if isinstance(model.head, Bytes):
        dense = (model.head.q.float() - 128) * model.head.scale[:, None]
        assert bool(((dense - weight).abs() <= model.head.scale[:, None] / 2 + 1e-7).all())
    assert model.lm_head.weight is weight
    assert list(model.state_dict()) == names
    grow_embeddings(model, 96, [[1, 2]])
    assert model.head is model.lm_head.weight
    double = Llama(config).double()
    quantize_layers(double, 8, None, rounds_inputs=False)
    multiply_head_in_bytes(double, cpu)
    assert double.head is double.lm_head.weight


@native
def test_a_model_that_is_cast_keeps_its_output_projection_in_bytes_right() -> None:
    """The scales stay floats to the product, and it refuses states that it would misread."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = Llama(LlamaConfig(vocab_size=96, **shape))
    quantize_layers(model, 8, None, rounds_inputs=False)
    multiply_head_in_bytes(model, torch.device("cpu"))
    states, labels = torch.randn(40, 32, generator=torch.Generator().manual_seed(2)), torch.arange(40)
    before = linear_cross_entropy(states, model.head, labels)
    model.to(torch.bfloat16)
    torch.testing.assert_close(linear_cross_entropy(states, model.head, labels), before, rtol=1e-2, atol=0)
    with pytest.raises(ValueError, match=r"not multiplied with .*float64"):
        linear_cross_entropy(states.double(), model.head, labels)
    with pytest.raises(ValueError, match=r"not multiplied with .*float16"), torch.autocast("cpu", torch.float16):
        linear_cross_entropy(states, model.head, labels)


def test_where_they_are_there_they_are_worth_it() -> None:
    """Not beside AMX, whose bfloat16 is faster; float64, and what is being compiled, never."""
    assert not byte_products.takes(torch.zeros(2, 2, dtype=torch.float64))
    assert not byte_products.takes(torch.zeros(2, 2, device="meta"))
    if native_dtype(torch.device("cpu")) == torch.float32:
        assert byte_products.takes(torch.zeros(2, 2)) == byte_products._there()
