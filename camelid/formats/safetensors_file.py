"""Write safetensors files tensor by tensor, down to the disk, with the digest made on the way.

The format (github.com/huggingface/safetensors): eight bytes of header length, a JSON header padded with blanks to
eight bytes, then the tensors' bytes in the header's order. Reading is the safetensors library's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from camelid.disk import write_file

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write named tensors, any device. Returns the file's SHA-256. Raises KeyError for a dtype that has no name."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for tensor in tensors.values():
            if tensor.numel():
                flat = tensor.detach().cpu().contiguous().flatten()
                yield memoryview(flat.view(torch.uint8).numpy().data)

    return write_file(path, parts())
