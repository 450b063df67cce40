"""Weights rounded and laid out for the native library, and inputs rounded to bytes, beside torch."""

from __future__ import annotations

import sys

import pytest
import torch

from camelid.errors import InputError
from camelid.kernels.library import library
from camelid.kernels.packed import KINDS, Packed, pack, pack_integers, round_symmetric, rounded
from camelid.model.quantized import round_to_nearest

pytestmark = pytest.mark.skipif(library() is None, reason="the native library is not built")


@pytest.mark.parametrize("bits", [8, 4])
def test_small_weights_are_rounded_alike_where_small_numbers_are_taken_for_none(bits: int) -> None:
    """A thread may be told so, by torch or by a library that was built for speed."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 1e-3
    weight[5] *= 1e-4
    usual = round_to_nearest(weight, bits, 32)
    packed = pack_integers(usual.packed, usual.scale, usual.zero, bits).data.clone()
    assert torch.set_flush_denormal(True)
    try:
        found = round_to_nearest(weight, bits, 32)
        again = pack_integers(found.packed, found.scale, found.zero, bits).data.clone()
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found.packed, usual.packed)
    assert torch.equal(found.scale, usual.scale)
    assert torch.equal(again, packed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_lost_piece_by_piece(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def packed(lose: bool) -> tuple[Packed, torch.Tensor]:
        weight = torch.randn(300, 512, generator=torch.Generator().manual_seed(0))
        if kind not in ("int8", "int4"):
            weight = weight.to(getattr(torch, kind))
            return pack(weight, kind, lose=lose), weight
        found = round_to_nearest(weight, int(kind[3:]), 32, symmetric=False)
        return pack_integers(found.packed, found.scale, found.zero, found.bits, lose=lose), found.packed

    expected, kept = packed(lose=False)
    monkeypatch.setattr("camelid.kernels.packed.PIECE", 20_000)
    found, lost = packed(lose=True)
    assert torch.equal(found.data, expected.data)
    assert kept.any(1).all()
    if sys.platform == "linux":
        assert not lost[100:200].any(1).all()  # of whose pages some are whole


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(8, 32, True), (4, 32, True), (4, 64, False), (8, 128, False)]
)
def test_no_weight_is_off_by_more_than_its_format_allows(bits: int, group: int, symmetric: bool) -> None:
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 40)[:, None]
    weight[3] = 0
    weight[4, 5] = 60 * weight[4, 6].abs()  # an outlier
    weight[5] = weight[5].abs() + 1  # all on one side
    found = round_to_nearest(weight, bits, group, symmetric)
    assert int(found.q.max()) < 2**bits
    step = found.scale.float().repeat_interleave(group, 1)
    bound = step / 2 if symmetric else step  # a zero is a whole number
    assert ((found.dense() - weight).abs() <= bound * 1.000001).all()
    assert (found.dense()[3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 32), (4, 128), (8, 128), (8, 5), (4, 10), (8, 44), (4, 20)])
def test_the_library_rounds_as_torch_does(
    dtype: torch.dtype, bits: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(37, 4 * group, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 4, 37)[:, None]
    weight[3], weight[4, 7] = 0, 1e4
    weight = weight.to(dtype)
    assert round_symmetric(weight, bits, group) is not None
    ours = round_to_nearest(weight, bits, group)
    monkeypatch.setattr("camelid.model.quantized.round_symmetric", lambda *given: None)
    theirs = round_to_nearest(weight, bits, group)
    assert torch.equal(ours.scale, theirs.scale)
    assert torch.equal(ours.packed, theirs.packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 40, 59])
def test_a_weight_that_is_no_number_is_not_rounded(dtype: torch.dtype, value: float, place: int) -> None:
    weight = torch.ones(3, 60, dtype=dtype)
    assert round_symmetric(weight, 8, 20) is not None
    weight[1, place] = value
    assert round_symmetric(weight, 8, 20) is None
    with pytest.raises(InputError, match="NaN or infinite"):
        round_to_nearest(weight, 8, 20)


def test_integers_as_a_cast_model_keeps_them() -> None:
    """Scales in another dtype are those they were; what the library would misread is refused."""
    found = round_to_nearest(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)), 8, 32, symmetric=False)
    assert found.zero is not None
    plain = pack_integers(found.packed, found.scale, found.zero, 8).data
    assert torch.equal(pack_integers(found.packed, found.scale.float(), found.zero, 8).data, plain)
    with pytest.raises(ValueError, match="in bytes"):
        pack_integers(found.packed, found.scale, found.zero.half(), 8)
    with pytest.raises(ValueError, match="four bits without zeros"):
        pack_integers(found.packed, found.scale, None, 8, least=found.scale)
    small = round_to_nearest(torch.randn(64, 64), 8, 16, symmetric=True)
    with pytest.raises(ValueError, match="groups of 16"):
        pack_integers(small.packed, small.scale, None, 8)


def test_rounding_is_to_the_nearest_of_255_steps() -> None:
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * 10
    x[2, 32:] = 0
    error = (rounded(x) - x).view(7, 2, 32).abs().amax(-1)
    assert (error <= x.view(7, 2, 32).abs().amax(-1) / 254 * 1.00001).all()
    assert (rounded(x)[2, 32:] == 0).all()
