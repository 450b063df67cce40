"""`.bin` files: equal to torch's own reader on honest files; nothing runs from hostile ones."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
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


def described(pid: object, size: object = (2,), stride: object = (1,), offset: object = 0) -> bytes:
    """A pickle of one tensor whose storage is described by `pid`, written as torch writes it."""

    class Storage:
        pass

    class Lie:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, {})

    class Writer(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return pid if isinstance(value, Storage) else None

    made = io.BytesIO()
    Writer(made, protocol=2).dump({"w": Lie()})
    return made.getvalue()


@pytest.mark.parametrize(
    ("description", "said"),
    [
        (described(("storage", torch.FloatStorage, "0", "cpu", 4)), None),
        (described(("storage", torch.FloatStorage, "0", "cpu", 5)), "the storage data/0 is truncated"),
        (described(("storage", torch.FloatStorage, "7", "cpu", 4)), "the storage data/7 is missing"),
        (described(("storage", torch.FloatStorage, "0", "cpu", -1)), "length is -1"),
        (described(("storage", "FloatStorage", "0", "cpu", 4)), "storage's description is malformed"),
        (described(("module", torch.FloatStorage, "0", "cpu", 4)), "storage's description is malformed"),
        (described(("storage", torch.FloatStorage, "0")), "storage's description is malformed"),
        (described("storage"), "storage's description is malformed"),
        (described(("storage", torch.FloatStorage, "0", "cpu", 4), size=[2]), "tensor's description is malformed"),
        (described(("storage", torch.FloatStorage, "0", "cpu", 4), size=(2, 2)), "size and stride disagree"),
        (described(("storage", torch.FloatStorage, "0", "cpu", 4), (1,) * 8, (1,) * 8), None),
        (described(("storage", torch.FloatStorage, "0", "cpu", 4), (1,) * 9, (1,) * 9), "size and stride disagree"),
        (described(("storage", torch.FloatStorage, "0", "cpu", 4), offset=2), None),
        (described(("storage", torch.FloatStorage, "0", "cpu", 4), offset=3), "past the end"),
        (described(("storage", torch.FloatStorage, "0", "cpu", 4), offset=True), "offset is True"),
        (described(("storage", torch.FloatStorage, "0", "cpu", 4), (2, 2), (0, 1)), None),
        (described(("storage", torch.FloatStorage, "0", "cpu", 4), (5, 1), (0, 1)), "past the end"),
        (b"\x80\x02}r\x00\x00\x00\x7f.", "far beyond its length"),  # gigabytes, if it were played
        (b"\x80\x02\x8d" + b"\xff" * 7 + b"\x3f.", "is damaged"),
        (b"\x80\x04\x95" + b"\xff" * 8 + b"}.", "is damaged"),
    ],
)
def test_descriptions_made_by_hand(tmp_path: Path, description: bytes, said: str | None) -> None:
    with zipfile.ZipFile(tmp_path / "w.bin", "w") as made:
        made.writestr("archive/data.pkl", description)
        made.writestr("archive/data/0", np.arange(4, dtype=np.float32).tobytes())
    if said:
        with pytest.raises(FormatError, match=said):
            read_tensors(tmp_path / "w.bin")
    else:
        assert read_tensors(tmp_path / "w.bin")["w"].flatten().tolist() in ([0, 1], [2, 3], [0], [0, 1, 0, 1])


def test_numbers_the_other_way_round(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4)}, tmp_path / "w.bin")
    rewrite(tmp_path / "w.bin", tmp_path / "big.bin", byteorder=b"big")
    with pytest.raises(FormatError, match="not little-endian"):
        read_tensors(tmp_path / "big.bin")


def test_members_at_fault(tmp_path: Path) -> None:
    """Packed ones could unpack to more than there is memory; of two of a name it is not known which is meant."""
    for name, kind, members, said in (
        ("packed", zipfile.ZIP_DEFLATED, ["a/data.pkl"], "is compressed or encrypted"),
        ("twice", zipfile.ZIP_STORED, ["a/data.pkl", "a/data.pkl"], "two members share a name"),
        ("two", zipfile.ZIP_STORED, ["a/data.pkl", "b/data.pkl"], "no single data.pkl"),
        ("deep", zipfile.ZIP_STORED, ["a/b/data.pkl"], "no single data.pkl"),
        ("list", zipfile.ZIP_STORED, ["a/data.pkl"], "does not hold a dictionary"),
    ):
        with zipfile.ZipFile(tmp_path / name, "w", kind) as made, warnings.catch_warnings(action="ignore"):
            for member in members:
                made.writestr(member, pickle.dumps([1], protocol=2))
        with pytest.raises(FormatError, match=said):
            read_tensors(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken", pickle.dumps({"w": 1})])
def test_not_a_weights_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(FormatError, match=r"x\.bin is not a torch weights file"):
        read_tensors(tmp_path / "x.bin")
