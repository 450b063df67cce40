"""Metadata and tensors of GGUF that do not fit."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from camelid.formats.gguf_file import parse
from camelid.formats.gguf_write import _string, _value

from .changes import (
    GONE,
    INF,
    LARGE,
    NAN,
    Cases,
    Change,
    cut,
    written,
)


class Rewritten:
    """A GGUF file taken apart, to be put together otherwise."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.gguf"
        file = parse(self.path)
        self.metadata = {key: _value(value) for key, value in file.metadata.items()}
        self.version, self.alignment = 3, 32
        self.counts: list[int | None] = [None, None]
        numbers = {"F32": 0, "Q8_0": 8}
        self.tensors = [
            [t.name, [*reversed(t.shape)], numbers[t.type], bytes(t.data[t.start : t.start + t.size])]
            for t in file.tensors.values()
        ]
        self.offsets: dict[int, int] = {}

    def write(self) -> None:
        count, keys = self.counts
        out = b"GGUF" + struct.pack(
            "<IQQ", self.version, len(self.tensors) if count is None else count,
            len(self.metadata) if keys is None else keys,
        )  # fmt: skip
        out += b"".join(_string(key) + value for key, value in self.metadata.items())
        offset, body = 0, b""
        for number, (name, shape, kind, data) in enumerate(self.tensors):
            out += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            out += struct.pack("<IQ", kind, self.offsets.get(number, offset))
            body += data.ljust(-(-len(data) // 32) * 32, b"\0")
            offset = len(body)
        self.path.write_bytes(out.ljust(-(-len(out) // 32) * 32, b"\0") + body)


def rewritten(change: Callable[[Rewritten], None], folder: Path) -> None:
    file = Rewritten(folder)
    change(file)
    file.write()


def integer(value: int) -> bytes:
    return struct.pack("<IQ", 10, value)


def gguf_cases() -> Cases:
    name = "model.gguf"
    for share in (0, 0.0001, 0.01, 0.1, 0.5, 0.999):
        yield f"cut to {share:.2%}", partial(cut, name, share)
    yield "another magic", lambda folder: written(name, b"GGML" + (folder / name).read_bytes()[4:], folder)

    def setting(key: str, value: Any) -> Change:
        def change(file: Rewritten) -> None:
            file.metadata.pop(key, None)
            if value is not GONE:
                file.metadata[key] = value if isinstance(value, bytes) else _value(value)

        return partial(rewritten, change)

    def attribute(key: str, value: Any) -> Change:
        return partial(rewritten, lambda file: setattr(file, key, value))

    for version in (0, 1, 4, 2**32 - 1):
        yield f"version {version}", attribute("version", version)
    for count in (2**32, LARGE, 2**64 - 1):
        yield f"{count} tensors", attribute("counts", [count, None])
        yield f"{count} keys", attribute("counts", [None, count])
    sizes = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count", "context_length")
    for key in sizes:
        for value in (
            GONE,
            "64",
            2.5,
            True,
            [1],
            integer(0),
            integer(LARGE),
            integer(2**40),
            struct.pack("<Ii", 5, -1),
        ):
            yield f"llama.{key} {value!r:.20}", setting(f"llama.{key}", value)
    for key in (
        "attention.head_count_kv",
        "attention.key_length",
        "rope.freq_base",
        "attention.layer_norm_rms_epsilon",
    ):
        for value in ("x", [1], integer(0), struct.pack("<If", 6, NAN), struct.pack("<If", 6, INF)):
            yield f"llama.{key} {value!r:.20}", setting(f"llama.{key}", value)
    for value in (GONE, "gpt2", "", 7, ["llama"]):
        yield f"architecture {value!r}", setting("general.architecture", value)
    for value in (0, 3, 8192, 2**31, "32", [32], 2.5):
        yield f"alignment {value!r}", setting("general.alignment", value)
    for value in ("3", [3] * 9999, 2.5, integer(3), integer(LARGE), struct.pack("<Ii", 5, -1)):
        yield f"split.count {value!r:.20}", setting("split.count", value)
    for value in ("longrope", 7, ["linear"], "LINEAR", 2.5):
        yield f"scaling {value!r}", setting("llama.rope.scaling.type", value)
    tokens = "tokenizer.ggml.tokens"
    for told, raw in {
        "an endless string": struct.pack("<IQ", 8, LARGE), "an endless array": struct.pack("<IIQ", 9, 4, LARGE),
        "an endless array of strings": struct.pack("<IIQ", 9, 8, LARGE), "a type 99": struct.pack("<I", 99),
        "nested arrays": struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 500,
    }.items():  # fmt: skip
        yield told, setting("general.hostile", raw)
    for value in (GONE, "a", [1, 2], 7, ["a"] * 99_999, ["a"] * 400):
        yield f"tokens {value!r:.20}", setting(tokens, value)
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre"):
        for value in ("nothing", 7, ["gpt2"]):
            yield f"{key} {value!r}", setting(key, value)
    yield "merges of nothing", setting("tokenizer.ggml.merges", ["x y z", "nosuch token"])
    yield "merges that are numbers", setting("tokenizer.ggml.merges", [1, 2])
    yield "token types of another length", setting("tokenizer.ggml.token_type", [1, 1, 1])
    for key in ("eos_token_id", "eot_token_id"):
        for value in ("2", True, struct.pack("<Ii", 5, -1), [2]):
            yield f"{key} {value!r:.20}", setting(f"tokenizer.ggml.{key}", value)

    def tensor(index: int, value: Any) -> Change:
        def change(file: Rewritten) -> None:
            file.tensors[3][index] = value

        return partial(rewritten, change)

    for called in ("", "blk.0.attn_q.bias", "blk.99.attn_q.weight", "blk.-1.attn_q.weight", "output.weight.weight",
                   "blk.0.ffn_gate_exps.weight", "token_embd.weight", "../x"):  # fmt: skip
        yield f"a tensor called {called!r}", tensor(0, called)
    for shape in ([], [0], [32], [2**40, 2**40], [2**63, 2], [1, 1, 1, 1, 1], [32, 32, 2], [31, 33], [2**64 - 1]):
        yield f"a shape {shape}", tensor(1, shape)
    for kind in (4, 5, 16, 36, 99, 2**32 - 1):
        yield f"type {kind}", tensor(2, kind)
    for offset in (2**40, LARGE, 2**64 - 32):
        yield f"offset {offset}", attribute("offsets", {3: offset})

    def doubled(file: Rewritten) -> None:
        file.tensors.append(file.tensors[0])

    yield "a tensor twice", partial(rewritten, doubled)
    yield "no tensors", attribute("tensors", [])
