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
from camelid.kernels.byte_products import BLOCK, by_columns, by_rows
from camelid.kernels.precision import native_dtype
from camelid.model.quantized import QuantizedLinear, quantized

native = pytest.mark.skipif(not byte_products._there(), reason="this CPU does not multiply bytes, or has AMX")


def weight_of(out: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, scale, and the weight that they are, float64."""
    drawn = torch.Generator().manual_seed(out * size)
    q = torch.randint(0, 256, (out, size), dtype=torch.uint8, generator=drawn)
    scale = torch.rand(out, generator=drawn) + 0.01
    return q, scale, (q.double() - 128) * scale[:, None].double()


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
    q, scale, weight = weight_of(out, size)
    x, slope = states_of(rows, size, dtype), states_of(rows, out, dtype)
    for found, wanted in (
        (by_rows(x, q, scale), rounded(x) @ weight.T),
        (by_columns(slope, q, scale), rounded(slope.float() * scale) @ (q.double() - 128)),
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
    q, scale, _ = weight_of(600, 300)
    x, before = states_of(90, 300, torch.float32), torch.get_num_threads()
    whole = by_rows(x, q, scale)
    torch.set_num_threads(3 if before != 3 else 2)
    try:
        assert torch.equal(by_rows(x, q, scale), whole)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(by_rows(x[17:20], q, scale), whole[17:20])
    apart = torch.zeros(90, 400)
    apart[:, :300] = x
    assert torch.equal(by_rows(apart[:, :300], q, scale), whole)
    assert torch.equal(by_rows(x.T.contiguous().T, q, scale), whole)


@native
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_number_stays_none(bad: float, dtype: torch.dtype) -> None:
    """The guard has to see it; other rows are what they were."""
    q, scale, _ = weight_of(40, 200)
    x = states_of(3, 200, dtype)
    clean = by_rows(x, q, scale)
    x[1, 130] = bad
    found = by_rows(x, q, scale)
    assert bool(found[1].isnan().all())
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    slope = states_of(3, 40, dtype)
    slope[2, 0] = bad
    assert bool(by_columns(slope, q, scale)[2].isnan().all())


@native
def test_zeros_and_nothing_at_all() -> None:
    q, scale, _ = weight_of(40, 200)
    assert not by_rows(torch.zeros(2, 200), q, scale).any()
    assert by_rows(torch.zeros(0, 200), q, scale).shape == (0, 40)
    with pytest.raises(ValueError, match="does not meet 9 values a row"):
        by_rows(torch.zeros(2, 9), q, scale)
    with FakeTensorMode() as mode:
        x, fake = torch.empty(5, 200), mode.from_tensor(q)
        assert byte_products.takes(x)
        assert by_rows(x, fake, torch.empty(40)).shape == (5, 40)


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


def test_where_they_are_there_they_are_worth_it() -> None:
    """Not beside AMX, whose bfloat16 is faster; float64, and what is being compiled, never."""
    assert not byte_products.takes(torch.zeros(2, 2, dtype=torch.float64))
    assert not byte_products.takes(torch.zeros(2, 2, device="meta"))
    if native_dtype(torch.device("cpu")) == torch.float32:
        assert byte_products.takes(torch.zeros(2, 2)) == byte_products._there()
