"""Write a torch `.pth` file tensor by tensor: what torch.save makes of a dictionary of tensors, of which only one has
to be in memory at a time.

The file is a zip of stored members: `data.pkl`, which describes the tensors, and `data/N`, their bytes, which begin at
multiples of 64 bytes so that torch.load can map them.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from camelid.formats.checkpoint import Stored

ROOT = "archive"  # torch.save's own word for a file that it has no name of
ALIGNMENT = 64
# torch names the dtype of a pickled storage by these classes.
_STORAGES: dict[torch.dtype, type] = {
    torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage, torch.bfloat16: torch.BFloat16Storage,
    torch.float64: torch.DoubleStorage,
}  # fmt: skip


@dataclass(frozen=True)
class _Data:
    """The bytes of one tensor, which the pickle only names."""

    key: str
    tensor: Stored


class _Pickler(pickle.Pickler):
    """Describes each `Stored` as a tensor, and its bytes as a member of the file (torch/serialization.py, `_save`)."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, protocol=2)
        self.found: list[_Data] = []

    def persistent_id(self, value: object) -> Any:
        if not isinstance(value, _Data):
            return None
        count = value.tensor.nbytes // value.tensor.dtype.itemsize
        return ("storage", _STORAGES[value.tensor.dtype], value.key, "cpu", count)

    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, Stored):
            return NotImplemented
        data = _Data(str(len(self.found)), value)
        self.found.append(data)
        strides = tuple(math.prod(value.shape[n + 1 :]) for n in range(len(value.shape)))
        hooks: OrderedDict[str, Any] = OrderedDict()
        return torch._utils._rebuild_tensor_v2, (data, 0, tuple(value.shape), strides, False, hooks)


def write_archive(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write named tensors, each read when its turn comes. Raises KeyError for a dtype that weights do not have."""
    description = io.BytesIO()
    pickler = _Pickler(description)
    pickler.dump(dict(tensors))
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _member(archive, file, "data.pkl", description.getvalue())
        _member(archive, file, "byteorder", b"little")
        for data in pickler.found:
            flat = data.tensor.dense().cpu().contiguous().flatten()
            _member(archive, file, f"data/{data.key}", flat.view(torch.uint8).numpy().data)
        _member(archive, file, "version", b"3\n")


def _member(archive: zipfile.ZipFile, file: IO[bytes], name: str, data: bytes | memoryview) -> None:
    """One member, its bytes at a multiple of ALIGNMENT: an extra field of the header, `FB` as torch calls it, fills the
    gap."""
    info = zipfile.ZipInfo(f"{ROOT}/{name}")
    header = 30 + len(info.filename) + 4 + 20  # of the member, of `FB`, and of the sizes of 64 bits
    gap = -(file.tell() + header) % ALIGNMENT
    info.extra = b"FB" + gap.to_bytes(2, "little") + b"Z" * gap
    with archive.open(info, "w", force_zip64=True) as member:
        member.write(data)
