"""`.bin` files: equal to torch's own reader on honest files; nothing runs from hostile ones."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from camelid.errors import FormatError
from camelid.formats.pickle_reader import Archive


def read_tensors(path: Path) -> dict[str, Tensor]:
    archive = Archive(path)
    return {name: archive.read(name) for name in archive.tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_equals_torch(tmp_path: Path, dtype: torch.dtype) -> None:
    base = torch.arange(24).to(dtype).view(4, 6)
    state = {"a": base, "view": base[1:3, 2:5], "transposed": base.T, "scalar": base[0, 1], "empty": base[:0]}
    torch.save(state, tmp_path / "w.bin")
    ours = read_tensors(tmp_path / "w.bin")
    assert list(ours) == list(state)
    for name, tensor in state.items():
        assert torch.equal(ours[name], tensor)
        assert ours[name].dtype == dtype


def test_parameters_and_ordered_dicts(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / "a.bin")
    torch.save(dict(module.named_parameters()), tmp_path / "b.bin")
    for name in ("a.bin", "b.bin"):
        assert torch.equal(read_tensors(tmp_path / name)["weight"], module.weight)


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["value", "key"])
def test_a_payload_is_refused_and_not_run(tmp_path: Path, where: str) -> None:
    payload = Payload(tmp_path / "owned")
    torch.save({"w": payload} if where == "value" else [payload], tmp_path / "evil.bin")
    with pytest.raises(FormatError, match=r"evil\.bin.*system.*nothing was run"):
        read_tensors(tmp_path / "evil.bin")
    assert not (tmp_path / "owned").exists()


def rewrite(source: Path, target: Path, **changes: bytes) -> None:
    """Copy a torch file, replacing members by their last name."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            new.writestr(info.filename, changes.get(info.filename.split("/")[-1], old.read(info)))


def test_truncated_storage(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(100)}, tmp_path / "w.bin")
    rewrite(tmp_path / "w.bin", tmp_path / "short.bin", **{"0": b"\0" * 8})
    with pytest.raises(FormatError, match=r"short\.bin.*truncated"):
        read_tensors(tmp_path / "short.bin")


def test_a_tensor_past_its_storage(tmp_path: Path) -> None:
    class Lie:
        def __reduce__(self) -> tuple[Any, ...]:
            storage = torch.zeros(4).storage()
            return torch._utils._rebuild_tensor_v2, (storage, 0, (1000, 1000), (0, 1), False, {})

    torch.save({"w": Lie()}, tmp_path / "w.bin")
    with pytest.raises(FormatError, match="past the end"):
        read_tensors(tmp_path / "w.bin")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken", pickle.dumps({"w": 1})])
def test_not_a_weights_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(FormatError, match=r"x\.bin is not a torch weights file"):
        read_tensors(tmp_path / "x.bin")
