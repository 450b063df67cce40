"""A header that says something else of the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .changes import (
    LARGE,
    LAYER,
    Cases,
    Change,
    cut,
    grown,
    written,
)


def header_changed(change: Callable[[dict[str, Any]], None], folder: Path) -> None:
    """A safetensors file whose header says something else of the same bytes."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def front_replaced(front: bytes, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(front + path.read_bytes()[len(front) :])


def safetensors_cases() -> Cases:
    name = "model.safetensors"
    for told, size in {"0": 0, "1": 1, "more than the file": 2**40, "2^63": LARGE, "2^64-1": 2**64 - 1}.items():
        yield f"a header of {told} bytes", partial(front_replaced, size.to_bytes(8, "little"))
    for text in (b"[]", b"7", b'"x"', b"{", b"\xff\xff", b'{"a":' * 5000, b"{}{}"):
        data = len(text).to_bytes(8, "little") + text
        yield f"a header {text[:9]!r}", partial(written, name, data)
    for share in (0, 0.001, 0.5, 0.999):
        yield f"cut to {share:.1%}", partial(cut, name, share)
    yield "bytes after the last tensor", partial(grown, name, bytes(64))

    def at(key: str, value: Any) -> Change:
        def change(header: dict[str, Any]) -> None:
            header[LAYER][key] = value

        return partial(header_changed, change)

    def offsets(a: int, b: int) -> Change:
        def change(header: dict[str, Any]) -> None:
            begin, end = header[LAYER]["data_offsets"]
            header[LAYER]["data_offsets"] = [begin + a, end + b]

        return partial(header_changed, change)

    for kind in ("F8_E4M3", "I32", "BOOL", "F16", "F64", "U8", "X", "", 7, None, []):
        yield f"a tensor of {kind!r}", at("dtype", kind)
    for shape in ([], [1], [32], [-1, 32], [32, -32], [0, 0], [2**40, 2**40], [2**32, 2**32], [32.0, 32], ["32", 32],
                  "32", None, [32] * 99, [16, 64], [1024], [32, 32, 1]):  # fmt: skip
        yield f"a shape {str(shape)[:24]}", at("shape", shape)
    for a, b in ((-4, 0), (0, 4), (4, 0), (0, -4), (4, 4), (-8, -8), (2**40, 2**40), (-(2**40), 0), (0, -(2**40))):
        yield f"offsets moved by {a}, {b}", offsets(a, b)
    for value in ([0], [0, 1, 2], "0-4096", None, [0.0, 4096.0], [True, False], {"a": 1}):
        yield f"offsets {value!r}", at("data_offsets", value)

    def renamed(to: str) -> Change:
        def change(header: dict[str, Any]) -> None:
            header[to] = header.pop(LAYER)

        return partial(header_changed, change)

    for to in ("model.layers.9.self_attn.q_proj.weight", "model.layers.-1.self_attn.q_proj.weight", "", "lm_head.bias",
               "model.layers.0.self_attn.q_proj", "model.layers.0.__class__.weight", "model.forward.weight",
               "../../x", "\0", "model.layers.0.self_attn.q_proj.weight\0", "m" * 99999):  # fmt: skip
        yield f"a tensor called {to[:30]!r}", renamed(to)
    yield "no tensors", partial(written, name, (2).to_bytes(8, "little") + b"{}")
