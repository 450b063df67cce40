"""Pickles that ask for more than tensors, archives that are none, and params.json."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .changes import (
    GONE,
    INF,
    LARGE,
    NAN,
    Cases,
    cut,
    field,
    not_json,
    written,
)


class Called:
    """Pickles as a call of MODULE.NAME."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = function, arguments

    def __reduce__(self) -> Any:
        return self.made


def archive(members: dict[str, bytes], folder: Path, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(folder / "consolidated.00.pth", "w", compression) as file:
        for name, data in members.items():
            file.writestr(f"archive/{name}", data)


def described(data: bytes, folder: Path) -> None:
    """The file with another pickle."""
    with zipfile.ZipFile(folder / "consolidated.00.pth") as old:
        members = {info.filename.partition("/")[2]: old.read(info) for info in old.infolist()}
    archive(members | {"data.pkl": data}, folder)


def _second_description(folder: Path) -> None:
    with zipfile.ZipFile(folder / "consolidated.00.pth", "a") as file:
        file.writestr("other/data.pkl", pickle.dumps({}))


def opcodes(text: bytes) -> bytes:
    return b"\x80\x02" + text + b"."


def pth_cases() -> Cases:
    name = "consolidated.00.pth"
    hostile: dict[str, Any] = {
        "os.system": Called(os.system, "touch owned"), "eval": Called(eval, "1"), "exec": Called(exec, "1"),
        "open": Called(open, "owned", "w"), "getattr": Called(getattr, "x", "upper"),
        "import": Called(__import__, "os"), "torch.load": Called(torch.load, "x"),
        "a bytearray of 1 TB": Called(bytearray, 2**40),
    }  # fmt: skip
    for told, value in hostile.items():
        for protocol in (0, 2, 4):
            yield f"{told}, protocol {protocol}", partial(described, pickle.dumps({"w": value}, protocol))
    for told, value in {"a list": [1], "a number": 7, "None": None, "strings": {"a": "b"}, "a number as a name": {1: 2},
                        "nested": {"a": {"b": {}}}, "nothing": {}}.items():  # fmt: skip
        yield told, partial(described, pickle.dumps(value, 2))
    rebuild, persistent = b"ctorch._utils\n_rebuild_tensor_v2\n", b"X\x01\x00\x00\x00aQ"
    for told, text in {
        "a call without arguments": rebuild + b")R", "a storage of text": rebuild + b"(" + persistent + b"tR",
        "memory of 4 billion": b"j\xff\xff\xff\xff", "an unknown extension": b"\x82\x01", "an open mark": b"(((",
        "an empty stack": b"0", "a build of nothing": b"}b", "an object": b"(ios\nsystem\n",
        "global of sys.modules": b"csys\nmodules\n", "a dotted name": b"ctorch\nnn.Module\n",
        "an endless string": b"X\xff\xff\xff\x7fa", "recursion": b"(" * 50_000 + b"l" * 50_000,
    }.items():  # fmt: skip
        yield told, partial(described, opcodes(text))
    yield "no pickle", partial(described, b"")

    def storages(kind: str, key: Any, count: Any, size: Any = (4,), stride: Any = (1,), start: Any = 0) -> bytes:
        class Pickler(pickle.Pickler):
            def persistent_id(self, value: Any) -> Any:
                return ("storage", getattr(torch, kind), key, "cpu", count) if value == "STORAGE" else None

        out = io.BytesIO()
        tensor = Called(torch._utils._rebuild_tensor_v2, "STORAGE", start, size, stride, False, {})
        Pickler(out, 2).dump({"norm.weight": tensor})
        return out.getvalue()

    for told, data in {
        "an unknown storage": storages("FloatStorage", "99", 4),
        "a storage up a folder": storages("FloatStorage", "../x", 4),
        "a storage too long": storages("FloatStorage", "0", 2**40),
        "a negative storage": storages("FloatStorage", "0", -1),
        "a storage of 2.5": storages("FloatStorage", "0", 2.5),
        "bytes": storages("ByteStorage", "0", 4),
        "quantised numbers": storages("QInt8Storage", "0", 4),
        "complex numbers": storages("ComplexFloatStorage", "0", 4),
        "a tensor past its storage": storages("FloatStorage", "1", 4, (2**30,)),
        "a negative start": storages("FloatStorage", "1", 4, (4,), (1,), -4),
        "a negative stride": storages("FloatStorage", "1", 4, (4,), (-1,)),
        "a negative size": storages("FloatStorage", "1", 4, (-4,)),
        "one number a billion times": storages("FloatStorage", "1", 4, (2**15, 2**15), (0, 0)),
        "99 dimensions": storages("FloatStorage", "1", 4, (1,) * 99, (1,) * 99),
        "a stride too few": storages("FloatStorage", "1", 4, (2, 2), (1,)),
        "a size of text": storages("FloatStorage", "1", 4, "44"),
    }.items():  # fmt: skip
        yield told, partial(described, data)

    def repacked(change: Callable[[dict[str, bytes]], dict[str, bytes]], compression: int, folder: Path) -> None:
        with zipfile.ZipFile(folder / name) as old:
            members = {info.filename.partition("/")[2]: old.read(info) for info in old.infolist()}
        archive(change(members), folder, compression)

    stored = zipfile.ZIP_STORED
    yield "compressed", partial(repacked, lambda m: m, zipfile.ZIP_DEFLATED)
    yield "no description", partial(repacked, lambda m: {k: v for k, v in m.items() if k != "data.pkl"}, stored)
    yield "two descriptions", _second_description
    yield (
        "storages cut short",
        partial(repacked, lambda m: {k: v[:8] if "data/" in k else v for k, v in m.items()}, stored),
    )
    yield "no storages", partial(repacked, lambda m: {k: v for k, v in m.items() if "data/" not in k}, stored)
    for share in (0, 0.01, 0.5, 0.999):
        yield f"cut to {share:.1%}", partial(cut, name, share)
    for told, data in {"text": b"hello", "an ELF file": b"\x7fELF" + bytes(99), "an old pickle": pickle.dumps({"a": 1}),
                       "a tar": b"\0" * 1024}.items():  # fmt: skip
        yield told, partial(written, name, data)
    yield from not_json("params.json")
    for key in ("dim", "n_layers", "n_heads"):
        yield from field("params.json", key, GONE, None, 0, -1, 2.5, "64", True, [], LARGE, 7)
    yield from field("params.json", "n_kv_heads", 0, -1, 2.5, "1", [], LARGE)
    yield from field("params.json", "norm_eps", 0, -1, NAN, INF, "x", [], True)
    yield from field("params.json", "rope_theta", 0, -1, NAN, INF, "x", [], True)
