"""`.pth` files written tensor by tensor: what torch reads of them, mapped or not, and that only one is in memory."""

from __future__ import annotations

import tempfile
import weakref
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from camelid.formats.checkpoint import Stored
from camelid.formats.pickle_reader import Archive
from camelid.formats.pickle_writer import ALIGNMENT, write_archive

SHAPES = st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


def stored(tensor: Tensor) -> Stored:
    return Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@given(st.lists(st.tuples(SHAPES, DTYPES), max_size=6))
def test_torch_reads_what_was_written(kinds: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    tensors = {f"layers.{n}.w": torch.randn(shape).to(dtype) for n, (shape, dtype) in enumerate(kinds)}
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "w.pth"
        write_archive(path, {name: stored(tensor) for name, tensor in tensors.items()})
        for mapped in (False, True):
            found = torch.load(path, weights_only=True, mmap=mapped)
            assert list(found) == list(tensors)
            for name, tensor in tensors.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name], tensor)
        ours = Archive(path)
        assert all(torch.equal(ours.read(name), tensor) for name, tensor in tensors.items())
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            assert all(offset(path, m) % ALIGNMENT == 0 for m in archive.infolist())


def offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return member.header_offset + 30 + name + extra


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    storages: list[weakref.ref[torch.UntypedStorage]] = []
    most = 0

    def read(n: int) -> Tensor:
        nonlocal most
        made = torch.full((8, 8), float(n))
        storages.append(weakref.ref(made.untyped_storage()))
        most = max(most, sum(one() is not None for one in storages))
        return made

    write_archive(tmp_path / "w.pth", {str(n): Stored((8, 8), torch.float32, partial(read, n)) for n in range(20)})
    assert 1 <= most <= 2
    assert [float(t[0, 0]) for t in torch.load(tmp_path / "w.pth").values()] == list(range(20))


def test_a_dtype_that_weights_do_not_have(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_archive(tmp_path / "w.pth", {"w": stored(torch.zeros(2, dtype=torch.int8))})
