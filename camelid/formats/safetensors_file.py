"""Safetensors files tensor by tensor: read when asked for, written down to the disk with the digest made on the way.

The format (github.com/huggingface/safetensors): eight bytes of header length, a JSON header padded with blanks to
eight bytes, then the tensors' bytes in the header's order. Reading is the safetensors library's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camelid.disk import write_file
from camelid.errors import FormatError
from camelid.formats.checkpoint import Stored, dense

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in NAMES.items()}


# Bytes read of a file before it is mapped anew: what was read and let go is no longer the process's. A tensor of fewer
# than SMALL is copied, that a norm does not keep the matrices around it.
MAPPED, SMALL = 32 << 20, 1 << 20


class OpenFile:
    """The file that is read: one at a time, for what is mapped of it counts as memory. A tensor that is not SMALL keeps
    its own file mapped for as long as it lives."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: Any = None
        self._read_bytes = 0

    def _opened(self, path: Path) -> Any:
        from safetensors import safe_open

        if path != self._path or self._read_bytes > MAPPED:
            self._path, self._file, self._read_bytes = None, None, 0
            self._file = safe_open(path, framework="pt")
            self._path = path
        return self._file

    def tensors(self, path: Path) -> Iterator[tuple[str, Stored]]:
        """The tensors of a file, none of them read. Raises FormatError for a file that is damaged, or holds numbers of
        a kind that no LLaMA has."""
        from safetensors import SafetensorError

        try:
            file = self._opened(path)
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                declared = file.get_slice(name)
                kind = declared.get_dtype()
                if kind not in _DTYPES:
                    raise FormatError(f"{path}: tensor {name!r} is of {kind}, which camelid does not read")
                yield name, Stored(tuple(declared.get_shape()), _DTYPES[kind], partial(self._read, path, name))
        except SafetensorError as error:
            raise _damaged(path, error) from None

    def _read(self, path: Path, name: str) -> Tensor:
        from safetensors import SafetensorError

        try:
            found: Tensor = self._opened(path).get_tensor(name)
        except SafetensorError as error:
            raise _damaged(path, error) from None
        self._read_bytes += found.nbytes
        return found.clone() if found.nbytes < SMALL else found


def _damaged(path: Path, error: Exception) -> FormatError:
    return FormatError(f"{path} is truncated or damaged ({error}): download or copy it again")


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor | Stored], metadata: Mapping[str, str] | None = None
) -> str:
    """Write named tensors, any device; those on disk are read one by one. Returns the file's SHA-256. Raises KeyError
    for a dtype that has no name."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for tensor in tensors.values():
            if tensor.nbytes:
                flat = dense(tensor).cpu().contiguous().flatten()
                yield memoryview(flat.view(torch.uint8).numpy().data)

    return write_file(path, parts())
