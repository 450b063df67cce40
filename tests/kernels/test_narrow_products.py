"""Products with narrow matrices against float64; torch's where the native ones do not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from camelid.kernels import narrow_products
from camelid.kernels.narrow_products import NARROW, between, down, up_
from camelid.kernels.products import _there as native_ones

BF16 = torch.bfloat16
native = pytest.mark.skipif(not native_ones(), reason="torch multiplies bfloat16 itself on this CPU")
ranks = st.sampled_from([2, 4, 6, 8, 10, 16])
scales, dtypes = st.sampled_from([1.0, 2.0, 0.37]), st.sampled_from([torch.float32, BF16])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def near(found: Tensor, wanted: Tensor, rounded: bool = True) -> bool:
    """To the last digit of bfloat16, or of a float32 sum."""
    allowed = wanted.abs() * (2**-8 if rounded else 1e-5) + 2e-6 * wanted.square().mean().sqrt()
    return bool(((found.double() - wanted).abs() <= allowed).all())


def check(tokens: int, wide: int, rank: int, scale: float, narrow: torch.dtype) -> None:
    x, y, z = drawn(tokens, wide).to(BF16), drawn(tokens, rank, seed=1).to(BF16), drawn(tokens, wide, seed=2).to(BF16)
    a, b = drawn(rank, wide, seed=3).to(narrow), drawn(wide, rank, seed=4).to(narrow)
    assert narrow_products._takes(x, a, rank, True)
    whole_a, whole_b = a.to(BF16).double(), b.to(BF16).double()
    assert near(down(x, a.T, scale), scale * x.double() @ whole_a.T)
    assert near(down(x, b, scale), scale * x.double() @ whole_b)
    assert near(up_(z.clone(), y, a, scale), z.double() + scale * y.double() @ whole_a)
    assert near(up_(z.clone(), y, b.T, scale), z.double() + scale * y.double() @ whole_b.T)
    if rank < wide:
        for found, wanted in ((between(y, x, scale), scale * y.double().T @ x.double()),
                              (between(x, y, scale), scale * x.double().T @ y.double())):  # fmt: skip
            assert found.shape == wanted.shape
            assert near(found, wanted, rounded=False)


@native
@settings(max_examples=80, deadline=None)
@given(st.integers(32, 90), st.integers(1, 150), ranks, scales, dtypes)
def test_products_of_any_shape(tokens: int, wide: int, rank: int, scale: float, narrow: torch.dtype) -> None:
    check(tokens, wide, rank, scale, narrow)


@native
@pytest.mark.parametrize("shape", [(1037, 2048, 16), (300, 4099, 8), (2050, 65, 4)])
def test_products_in_several_parts(shape: tuple[int, int, int]) -> None:
    """More rows than stay near at once."""
    check(*shape, 0.5, torch.float32)


@native
def test_the_same_bits_on_any_number_of_threads_and_from_any_place() -> None:
    x, y, a, before = drawn(500, 200).to(BF16), drawn(500, 16).to(BF16), drawn(16, 200), torch.get_num_threads()

    def all_of_them(x: Tensor, y: Tensor) -> list[Tensor]:
        return [down(x, a.T, 2.0), up_(x.contiguous().clone(), y, a, 2.0), between(y, x, 2.0), between(x, y, 2.0)]

    wanted = all_of_them(x, y)
    apart, beside = torch.zeros(500, 300, dtype=BF16), torch.zeros(500, 40, dtype=BF16)
    apart[:, 7:207], beside[:, 2:18] = x, y
    across = x.T.contiguous().T, y.T.contiguous().T  # laid out by columns: copied first
    torch.set_num_threads(3 if before != 3 else 2)
    try:
        for given_x, given_y in ((x, y), (apart[:, 7:207], beside[:, 2:18]), across):
            assert all(map(torch.equal, all_of_them(given_x, given_y), wanted))
    finally:
        torch.set_num_threads(before)
    within = apart[:, 7:207]
    up_(within, y, a, 2.0)
    assert torch.equal(within, wanted[1])
    assert not apart[:, :7].any()
    assert not apart[:, 207:].any()


@native
def test_no_number_stays_none() -> None:
    x, y, a = drawn(40, 64).to(BF16), drawn(40, 8).to(BF16), drawn(8, 64)
    x[3, 5] = float("nan")
    assert down(x, a.T, 1.0).isnan().any(1).nonzero().flatten().tolist() == [3]
    assert between(y, x, 1.0).isnan().any(0).nonzero().flatten().tolist() == [5]
    assert up_(x, y, a, 1.0).isnan().sum() == 1


@pytest.mark.parametrize(
    ("tokens", "rank", "dtype"),
    [(50, 3, BF16), (50, NARROW + 2, BF16), (31, 4, BF16), (50, 4, torch.float32), (50, 4, torch.float64)],
)
def test_others_are_torchs(tokens: int, rank: int, dtype: torch.dtype) -> None:
    x, y, a, b = drawn(tokens, 90).to(dtype), drawn(tokens, rank).to(dtype), drawn(rank, 90), drawn(90, rank)
    assert torch.equal(down(x, a.T, 1.0), x @ a.to(dtype).T)
    assert torch.equal(down(x, b, 2.0), (x @ b.to(dtype)).mul_(2.0))
    assert torch.equal(up_(x.clone(), y, a, 2.0), x.clone().addmm_(y, a.to(dtype), alpha=2.0))
    assert torch.equal(between(y, x, 1.0), y.T @ x)
    assert torch.equal(between(x, y, 2.0), (y.T @ x).mul_(2.0).T)


def test_what_does_not_meet_is_refused_and_what_lies_apart_is_right() -> None:
    x, y, a = drawn(40, 64).to(BF16), drawn(40, 8).to(BF16), drawn(8, 64)
    for wrong in (
        lambda: down(x, drawn(9, 8), 1.0),
        lambda: up_(x.clone(), y.float(), a, 1.0),
        lambda: up_(x.clone(), y[:33], a, 1.0),
        lambda: between(y.float(), x, 1.0),
        lambda: between(y[:33], x, 1.0),
        lambda: up_(x[:1].expand(40, 64), y, a, 1.0),
    ):
        with pytest.raises(RuntimeError):
            wrong()
    wanted = up_(x.clone(), y, a, 1.0)
    across = x.T.contiguous().T
    torch.testing.assert_close(up_(across, y, a, 1.0), wanted)


def test_a_rehearsal_has_their_shapes() -> None:
    with FakeTensorMode():
        x, y, a = torch.empty(40, 64, dtype=BF16), torch.empty(40, 8, dtype=BF16), torch.empty(8, 64)
        assert down(x, a.T, 1.0).shape == (40, 8)
        assert up_(x, y, a, 1.0) is x
        assert between(y, x, 1.0).shape == (8, 64)
        assert between(x, y, 1.0).shape == (64, 8)
