"""Read tensors from a torch `.bin`/`.pth` file without executing its pickle.

The file is a zip of stored (uncompressed) members: `data.pkl`, a pickle stream describing the tensors, and
`data/N`, their bytes. The stream is run by the standard unpickler with `find_class` closed: only the handful of
names below resolve, each to an inert stub of ours, so nothing in the file is ever called but them. Storages are
bounds-checked against their members; only dense tensors pass. Anything else is refused by name.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camelid.errors import FormatError

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}
MAX_DESCRIPTION_BYTES = 64 * 2**20
_FAULTS = (
    zipfile.BadZipFile, pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError,
    OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class _StorageKind:
    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage:
    member: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class Described:
    """A tensor that was not read yet: elements of `storage` from `start` on, by `size` and `stride`."""

    storage: _Storage
    start: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _whole(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise FormatError(f"{what} is {value!r}, not a whole number")
    return value


def _rebuild(storage: object, offset: object, size: object, stride: object, *_: object) -> Described:
    """torch._utils._rebuild_tensor_v2: a strided view of a storage, with its bounds checked."""
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise FormatError("a tensor's description is malformed")
    if len(size) != len(stride) or len(size) > 8:
        raise FormatError("a tensor's size and stride disagree")
    start = _whole(offset, "a tensor's offset")
    sizes = [_whole(n, "a tensor's size") for n in size]
    strides = [_whole(n, "a tensor's stride") for n in stride]
    end = start + 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) if all(sizes) else start
    if end > storage.count or math.prod(sizes) > storage.count:
        raise FormatError("a tensor reaches past the end of its storage: the file is truncated or hostile")
    return Described(storage, start, tuple(sizes), tuple(strides))


def _parameter(data: object, *_: object) -> object:
    return data


class _Unpickler(pickle.Unpickler):  # closed: see find_class
    def __init__(self, stream: io.BytesIO, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(stream)
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter
        if module == "torch" and name in _DTYPES:
            return _StorageKind(_DTYPES[name])
        raise FormatError(f"its pickle asks for {module}.{name}, which no weights need: refused, nothing was run")

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], _StorageKind):
            raise FormatError("a storage's description is malformed")
        kind, key, count = pid[1], str(pid[2]), _whole(pid[4], "a storage's length")
        try:
            info = self._archive.getinfo(f"{self._root}/data/{key}")
        except KeyError:
            raise FormatError(f"the storage data/{key} is missing") from None
        if info.file_size < count * kind.dtype.itemsize:
            raise FormatError(f"the storage data/{key} is truncated")
        return _Storage(info.filename, kind.dtype, info.file_size // kind.dtype.itemsize)


def _check_sizes(stream: bytes) -> None:
    """The unpickler makes room for whatever length a stream claims, and for its largest place to remember something at,
    before it looks what follows: a few bytes could ask for gigabytes. Raises ValueError when one is cut off."""
    for number, (code, argument, _) in enumerate(pickletools.genops(stream)):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument is not None and argument > number:
            raise FormatError("its pickle remembers something at a place far beyond its length")


class Archive:
    """A torch weights file whose tensors are known by name and read one at a time. Raises FormatError naming the file
    and what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                root = _check_members(archive)
                description = archive.getinfo(f"{root}/data.pkl")
                if description.file_size > MAX_DESCRIPTION_BYTES:
                    raise FormatError("its data.pkl is too large for a description of tensors")
                if f"{root}/byteorder" in archive.namelist() and archive.read(f"{root}/byteorder") != b"little":
                    raise FormatError("its numbers are not little-endian, as those of every machine that runs this are")
                stream = archive.read(description)
                _check_sizes(stream)
                found = _Unpickler(io.BytesIO(stream), archive, root).load()
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None
        except _FAULTS as error:
            raise FormatError(f"{path} is not a torch weights file, or is damaged ({error})") from None
        good = isinstance(found, dict) and all(
            isinstance(k, str) and isinstance(v, Described) for k, v in found.items()
        )
        if not good:
            raise FormatError(f"{path} does not hold a dictionary of named tensors")
        self.tensors: dict[str, Described] = dict(found)

    def read(self, name: str) -> Tensor:
        """One tensor's elements; of its storage only the stretch that it spans is read."""
        tensor = self.tensors[name]
        dtype = tensor.storage.dtype
        span = 1 + sum((n - 1) * step for n, step in zip(tensor.size, tensor.stride, strict=True))
        if not all(tensor.size):
            return torch.empty(tensor.size, dtype=dtype)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(tensor.storage.member) as member:
                member.seek(tensor.start * dtype.itemsize)
                data = bytearray(member.read(span * dtype.itemsize))
        except _FAULTS as error:
            raise FormatError(f"{self.path}: {name!r} cannot be read ({error})") from None
        if len(data) != span * dtype.itemsize:
            raise FormatError(f"{self.path}: {name!r} is cut off: the file is truncated")
        found = torch.frombuffer(data, dtype=dtype).as_strided(tensor.size, tensor.stride)
        return found.contiguous()


def _check_members(archive: zipfile.ZipFile) -> str:
    names = [info.filename for info in archive.infolist()]
    if len(set(names)) != len(names):
        raise FormatError("two members share a name")
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise FormatError(f"the member {info.filename} is compressed or encrypted; torch stores members plainly")
    roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise FormatError("it has no single data.pkl")
    return roots[0]
