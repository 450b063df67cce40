"""A GGUF file (ggml's docs/gguf.md, versions 2 and 3): metadata, and tensors as float32, in their own dtype, or as
whole numbers.

Nothing is allocated from a number the file declares: every count is checked against the bytes that are left, and
every tensor must end within the file. Quantised blocks (`gguf_blocks.py`) are expanded to float32.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camelid.artifact import parts
from camelid.errors import FormatError
from camelid.formats.gguf_blocks import BLOCKS, WHOLE, expand, whole
from camelid.model.quantized import GROUP, Integers, round_to_nearest

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
AT_ONCE = 8 << 20  # values that are expanded together, to be rounded


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` in torch order, `start` and `size` in bytes of the file, which is mapped."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    size: int
    data: mmap.mmap


@dataclass(frozen=True)
class GGUF:
    """A parsed file, or all files of a model that was split: the first one's metadata by key, and tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def tensor(self, name: str) -> Tensor:
        """One tensor, expanded when quantised. Raises FormatError naming a type that is not supported."""
        info = self.tensors[name]
        with self._raw(info) as raw:
            if info.type in PLAIN:
                return torch.from_numpy(raw.copy()).view(PLAIN[info.type]).view(info.shape)
            return torch.from_numpy(expand(info.type, raw)).view(info.shape)

    def integers(self, name: str) -> Integers:
        """A quantised matrix as whole numbers: see `Stored`."""
        info = self.tensors[name]
        if info.type not in WHOLE:
            return self._rounded(info)
        with self._raw(info) as raw:
            parts = whole(info.type, raw)
        rows = info.shape[0]
        q, scale, least = (None if part is None else torch.from_numpy(part).view(rows, -1) for part in parts)
        assert q is not None
        assert scale is not None
        if not all(bool(part.isfinite().all()) for part in (scale, least) if part is not None):
            raise FormatError(f"{self.path}: tensor {name!r} has a scale that is NaN or infinite: copy the file again")
        return Integers(q, scale, None, WHOLE[info.type][0], least)

    def _rounded(self, info: TensorInfo) -> Integers:
        """To int8, some rows at a time: an embedding that is expanded as a whole is the largest thing in memory."""
        rows, columns = info.shape
        some = max(1, AT_ONCE // columns)
        with self._raw(info) as raw:
            lines = raw.reshape(rows, -1)
            expanded = (expand(info.type, lines[at : at + some].ravel()) for at in range(0, rows, some))
            parts = [round_to_nearest(torch.from_numpy(part).view(-1, columns), 8, GROUP) for part in expanded]
        return Integers(torch.cat([p.packed for p in parts]), torch.cat([p.scale for p in parts]), None, 8)

    @contextmanager
    def _raw(self, info: TensorInfo) -> Iterator[NDArray[np.uint8]]:
        """A tensor's bytes, as they lie in the file. Afterwards they are no longer the process's."""
        yield np.frombuffer(info.data, np.uint8, info.size, info.start)
        if hasattr(mmap, "MADV_DONTNEED"):
            first = info.start // mmap.PAGESIZE * mmap.PAGESIZE
            with suppress(OSError):
                info.data.madvise(mmap.MADV_DONTNEED, first, info.start + info.size - first)


def integer_bytes(info: TensorInfo) -> int:
    """Of what `integers` gives."""
    bits, has_least = WHOLE.get(info.type, (8, False))
    return math.prod(info.shape) * bits // 8 + math.prod(info.shape) // 32 * (4 if has_least else 2)


class _Reader:
    """A cursor that never reads past the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.bytes = memoryview(self.data)
        self.at = 0

    def fail(self, what: str) -> FormatError:
        return FormatError(f"{self.path} (byte {self.at}): {what}")

    def take(self, count: int) -> memoryview:
        if count > len(self.bytes) - self.at:
            raise self.fail(f"{count} bytes are declared, {len(self.bytes) - self.at} are left: truncated or hostile")
        self.at += count
        return self.bytes[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        return str(self.take(self.number("Q")), "utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 2:
            raise self.fail(f"unknown metadata type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[inner]}")
            if count > (len(self.bytes) - self.at) // size:
                raise self.fail(f"an array of {count} elements is declared, which is more than the file holds")
            return list(struct.unpack(f"<{count}{_SCALARS[inner]}", self.take(count * size)))
        if count > len(self.bytes) - self.at:
            raise self.fail(f"an array of {count} elements is declared, which is more than the file holds")
        if inner == _STRING:
            return self.strings(count)
        return [self.value(inner, depth + 1) for _ in range(count)]

    def strings(self, count: int) -> list[str]:
        """As many calls of `string`, of which a vocabulary takes a hundred thousand."""
        found, size_at, data, at = list[str](), struct.Struct("<Q").unpack_from, self.bytes, self.at
        for _ in range(count):
            if at + 8 > len(data) or size_at(data, at)[0] > len(data) - at - 8:
                self.at = at
                self.string()  # says what is wrong
            end = at + 8 + size_at(data, at)[0]
            found.append(str(data[at + 8 : end], "utf-8", "replace"))
            at = end
        self.at = at
        return found


def parse(path: Path) -> GGUF:
    """Read a file's header. Raises FormatError naming the byte or the tensor at fault."""
    if path.stat().st_size < 24:
        raise FormatError(f"{path} is too short to be a GGUF file")
    r = _Reader(path)
    if bytes(r.take(4)) != b"GGUF":
        raise FormatError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
    version, tensor_count, key_count = r.number("I"), r.number("Q"), r.number("Q")
    if version not in (2, 3):
        raise FormatError(f"{path} has GGUF version {version}; camelid reads 2 and 3")
    if tensor_count + key_count > len(r.data):
        raise r.fail(f"{tensor_count} tensors and {key_count} keys are declared, which is more than the file holds")
    metadata = {r.string(): r.value(r.number("I")) for _ in range(key_count)}
    entries = [_entry(r) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 4096 or alignment & (alignment - 1):
        raise FormatError(f"{path}: general.alignment is {alignment!r}, not a power of two up to 4096")
    base = -(-r.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in entries:
        info = TensorInfo(name, shape, kind, base + offset, _byte_size(path, name, shape, kind), r.data)
        if info.start + info.size > len(r.data):
            raise FormatError(f"{path}: tensor {name!r} ends past the end of the file: truncated, copy it again")
        if name in tensors:
            raise FormatError(f"{path}: two tensors are named {name!r}")
        tensors[name] = info
    return GGUF(path, metadata, tensors)


def first_of(path: Path) -> Path:
    """Of the files of a model that was split, the one that says what it is; any other file itself."""
    return next(iter(parts(path)), path)


def parse_whole(path: Path) -> GGUF:
    """`parse` of a file, or of all files of a model from any one of them. Raises FormatError where one is not there, or
    is another model's."""
    given = parse(path)
    count = given.metadata.get("split.count", 1)
    if not isinstance(count, int) or count < 0:
        raise FormatError(f"{path}: split.count is no number of files, but {type(count).__name__}")
    if count < 2:  # joined ones say 0
        return given
    files = parts(path)
    if len(files) != count:
        raise FormatError(
            f"{path}: it is one of {count} files of a model, of which {len(files)} are here by names like "
            f"NAME-00001-of-{count:05d}.gguf: copy all of them into one folder, under their own names"
        )
    tensors: dict[str, TensorInfo] = {}
    found = [given if file == path else parse(file) for file in files]
    for number, (file, part) in enumerate(zip(files, found, strict=True)):
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (number, count):
            raise FormatError(f"{file}: it does not say that it is file {number + 1} of {count}: it is another model's")
        if twice := tensors.keys() & part.tensors.keys():
            raise FormatError(f"{file}: tensor {min(twice)!r} is in another file of this model too")
        tensors |= part.tensors
    declared = found[0].metadata.get("split.tensors.count", len(tensors))
    if declared != len(tensors):
        raise FormatError(
            f"{path}: the {count} files hold {len(tensors)} tensors, not {str(declared)[:20]}: one is of another model"
        )
    return GGUF(files[0], found[0].metadata, tensors)


def _entry(r: _Reader) -> tuple[str, tuple[int, ...], str, int]:
    name, dimensions = r.string(), r.number("I")
    if not 1 <= dimensions <= 4:
        raise r.fail(f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(reversed([r.number("Q") for _ in range(dimensions)]))
    kind, offset = r.number("I"), r.number("Q")
    return name, shape, TYPE_NAMES.get(kind, f"number {kind}"), offset


def _byte_size(path: Path, name: str, shape: tuple[int, ...], kind: str) -> int:
    count = math.prod(shape)
    if not count:
        raise FormatError(f"{path}: tensor {name!r} has no elements: its shape is {shape}")
    if kind in PLAIN:
        return count * PLAIN[kind].itemsize
    if kind not in BLOCKS:
        supported = ", ".join([*PLAIN, *BLOCKS])
        raise FormatError(f"{path}: tensor {name!r} has the type {kind}, which camelid does not read ({supported})")
    values, width, _ = BLOCKS[kind]
    if shape[-1] % values:
        raise FormatError(f"{path}: tensor {name!r} has rows of {shape[-1]}, not a multiple of {values} ({kind})")
    return count // values * width
