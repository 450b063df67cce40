"""Products of large bfloat16 matrices, native and torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from camelid.kernels import products
from camelid.kernels.products import by_both, by_columns, by_rows, linear

native = pytest.mark.skipif(not products._there(), reason="this CPU's bfloat16 products are torch's")
BF16 = torch.bfloat16
LONG, DEEP = 2100, 4099  # more than native/products.cpp takes at a time, of rows and of what is summed over


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def off(found: Tensor, wanted: Tensor) -> float:
    """The greatest difference, in units of what a sum of so many products of normal numbers is about."""
    return float((found.double() - wanted).abs().max() / wanted.square().mean().sqrt().clamp(min=1e-9))


def nearly(found: Tensor, wanted: Tensor) -> bool:
    """Off by no more than rounding to bfloat16, and what sums in float32 are off by."""
    allowed = wanted.abs() / 256 + 1e-4 * wanted.square().mean().sqrt()
    return found.dtype == BF16 and bool(((found.double() - wanted).abs() <= allowed).all())


def check(m: int, n: int, k: int, wide: bool) -> None:
    """All three products of [m, k] states, an [n, k] weight and [m, n] slopes against float64."""
    x, slope = drawn(m, k).to(BF16), drawn(m, n, seed=1).to(BF16)
    weight = drawn(n, k, seed=2).to(BF16)
    kept = weight.float() if wide else weight
    assert nearly(by_rows(x, kept), x.double() @ weight.double().T)
    assert nearly(by_columns(slope, kept), slope.double() @ weight.double())
    total, wanted = drawn(n, k, seed=3), slope.double().T @ x.double()
    before = total.double()
    assert off(by_both(slope, x, total), before + wanted) < 1e-4
    assert off(by_both(slope, x, total, add=False), wanted) < 1e-4  # what was there is gone


@native
@settings(max_examples=60, deadline=None)
@given(st.integers(32, 120), st.integers(1, 100), st.integers(1, 140), st.booleans())
def test_products_of_any_shape(m: int, n: int, k: int, wide: bool) -> None:
    check(m, n, k, wide)


@native
@pytest.mark.parametrize("shape", [(LONG, 40, DEEP), (33, 3000, 2048), (64, 64, 1024), (100, 17, 2050), (97, DEEP, 34)])
def test_products_in_several_parts(shape: tuple[int, int, int]) -> None:
    """More rows, columns and terms than go at once; and rows so far apart that they would meet in the cache."""
    check(*shape, wide=True)


@native
def test_a_weight_is_rounded_as_torch_rounds_it() -> None:
    x, weight = drawn(64, 96).to(BF16), drawn(80, 96)
    assert torch.equal(by_rows(x, weight), by_rows(x, weight.to(BF16)))
    assert torch.equal(by_columns(x, weight.T.contiguous()), by_columns(x, weight.T.contiguous().to(BF16)))


@native
@pytest.mark.parametrize(("tokens", "size"), [(150, 200), (1999, 48), (48, 1999)])
def test_bits_do_not_depend_on_the_threads(tokens: int, size: int) -> None:
    """Few rows are shared out evenly, 1,999 in whole tiles."""
    x, weight, slope = drawn(tokens, 90).to(BF16), drawn(size, 90), drawn(tokens, size).to(BF16)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append((by_rows(x, weight), by_columns(slope, weight), by_both(slope, x, torch.zeros(size, 90))))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@native
def test_rows_that_do_not_lie_one_after_the_other() -> None:
    wide = drawn(70, 200).to(BF16)
    x, out, weight = wide[:, 10:106], torch.empty(70, 300, dtype=BF16)[:, :48], drawn(48, 96)
    assert torch.equal(by_rows(x, weight, out=out), by_rows(x.contiguous(), weight))
    assert torch.equal(by_rows(x.T.contiguous().T, weight), out)  # laid out by columns: copied first


@native
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(bad: float) -> None:
    x, weight = drawn(40, 34).to(BF16), drawn(20, 34)
    good = by_rows(x, weight)
    x[7, 3] = bad
    found = by_rows(x, weight)
    assert not found[7].isfinite().any()
    assert torch.equal(found[:7], good[:7])
    assert torch.equal(found[8:], good[8:])


def learned(layer: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """What a layer makes of x under bfloat16 autocast, and its gradients."""
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    with torch.autocast("cpu", BF16):
        out = layer(leaves[0], leaves[1], leaves[2] if bias is not None else None)
    torch.manual_seed(5)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn(out.shape).to(out.dtype))]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_layer_learns_as_torchs_own(biased: bool, dtype: torch.dtype) -> None:
    x, weight = drawn(3, 40, 64).to(dtype), drawn(48, 64)
    bias = drawn(48) if biased else None
    for found, wanted in zip(learned(linear, x, weight, bias), learned(F.linear, x, weight, bias), strict=True):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        assert off(found, wanted.double()) < 0.03


@native
def test_a_weights_gradient_is_not_rounded_to_bfloat16() -> None:
    x, weight = drawn(512, 64).to(BF16), drawn(48, 64)
    torch.manual_seed(5)
    slope = torch.randn(512, 48).to(BF16)
    exact = slope.double().T @ x.double()
    assert off(learned(linear, x, weight, None)[2], exact) < 1e-4 < off(learned(F.linear, x, weight, None)[2], exact)


def test_without_them_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_there", lambda: False)
    x, weight, bias = drawn(40, 64), drawn(48, 64), drawn(48)
    for found, wanted in zip(learned(linear, x, weight, bias), learned(F.linear, x, weight, bias), strict=True):
        assert torch.equal(found, wanted)


def test_in_float32_it_is_torchs() -> None:
    x, weight = drawn(40, 64), drawn(48, 64)
    assert torch.equal(linear(x, weight, None), F.linear(x, weight))
    assert torch.equal(by_rows(x, weight), x @ weight.T)
    assert torch.equal(by_columns(x, weight.T), x @ weight.T)
