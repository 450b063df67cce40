"""GGUF's quantised blocks: as numbers and as whole numbers, with the library and without, against the gguf package."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from camelid.formats.gguf_blocks import BLOCKS, WHOLE, expand, whole
from camelid.model.quantized import Integers

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_the_reference_bit_for_bit(kind: str) -> None:
    """10,000 random blocks of each type, infinite and NaN scales among them, with the library and without."""
    _, width, function = BLOCKS[kind]
    raw = np.random.default_rng(0).integers(0, 256, (10_000, width), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).reshape(-1)
        for ours in (expand(kind, raw.reshape(-1)), function(raw).reshape(-1)):
            assert ((ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))).all()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kind", sorted(WHOLE))
def test_whole_numbers_mean_what_the_blocks_do(kind: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("camelid.kernels.gguf.library", lambda: None)
    raw = np.random.default_rng(1).integers(0, 256, (3000, BLOCKS[kind][1]), dtype=np.uint8)
    raw[:, (1, 3)] &= 0xBF  # finite scales, negative ones too
    if kind == "Q4_K":
        raw[:, (1, 3)] = raw[:, (1, 3)] & 0x83 | 0x18  # around 0.003, as they are
    q, scale, least = (None if part is None else torch.from_numpy(part) for part in whole(kind, raw.reshape(-1)))
    assert q is not None
    assert scale is not None
    meant = Integers(q, scale, None, WHOLE[kind][0], least).dense().numpy()
    exact = expand(kind, raw.reshape(-1)).reshape(meant.shape)
    if kind != "Q4_K":
        assert np.array_equal(meant, exact)
    else:
        assert least is not None
        most = (15 * scale.float().abs() + least.float().abs()).repeat_interleave(32, 1).numpy()
        assert (np.abs(meant - exact) <= most * 2.0**-11).all()


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_blocks_are_expanded_a_stretch_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("camelid.kernels.gguf.library", lambda: None)
    size, width, _ = BLOCKS[kind]
    raw = np.random.default_rng(0).integers(0, 60, 7 * width, dtype=np.uint8)
    at_once = expand(kind, raw)
    monkeypatch.setattr("camelid.formats.gguf_blocks.AT_ONCE", 3 * size)
    assert np.array_equal(expand(kind, raw), at_once, equal_nan=True)
