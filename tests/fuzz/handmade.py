"""Hostile models made by hand, by kind: what past advisories of loaders name. Each is a change to a sound model in a
folder (test_loaders.py makes them), and each must be refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from camelid.formats.gguf import parse
from camelid.formats.gguf_write import _string, _value

Change = Callable[[Path], None]
Cases = Iterator[tuple[str, Change]]
NAN, INF, LARGE = float("nan"), float("inf"), 2**63
GONE = object()
LAYER = "model.layers.0.self_attn.q_proj.weight"


def edited(name: str, keys: tuple[str, ...], value: Any, folder: Path) -> None:
    """One field of a JSON file set to `value`, or taken out."""
    path = folder / name
    whole = json.loads(path.read_text())
    node = whole
    for key in keys[:-1]:
        node = node.setdefault(key, {})
    if value is GONE:
        node.pop(keys[-1], None)
    else:
        node[keys[-1]] = value
    path.write_text(json.dumps(whole))


def written(name: str, data: bytes, folder: Path) -> None:
    (folder / name).write_bytes(data)


def field(name: str, key: str, *values: Any, inside: tuple[str, ...] = ()) -> Cases:
    for value in values:
        told = "gone" if value is GONE else repr(value)[:30]
        yield f"{name}: {'.'.join((*inside, key))} {told}", partial(edited, name, (*inside, key), value)


NOT_JSON: dict[str, bytes] = {
    "empty": b"", "a list": b"[]", "null": b"null", "a number": b"7", "cut off": b'{"a": ', "zeros": bytes(99),
    "not UTF-8": b'{"a": "\xff\xfe"}', "deep": b'{"a":' * 100_000, "deep lists": b"[" * 100_000,
    "a number of 5,000 digits": b'{"vocab_size": ' + b"9" * 5000 + b"}", "two objects": b"{}{}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
}  # fmt: skip


def not_json(name: str) -> Cases:
    for told, data in NOT_JSON.items():
        yield f"{name}: {told}", partial(written, name, data)


def config_cases() -> Cases:
    name = "config.json"
    yield from not_json(name)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        yield from field(name, key, GONE, None, 0, -1, 3, 2.5, "64", True, [], {}, LARGE, 10**9, NAN)
    yield from field(name, "num_key_value_heads", 0, -1, 3, 2.5, "1", [], LARGE)
    yield from field(name, "head_dim", -2, 1, 7, 2.5, "16", [], LARGE, 32)
    yield from field(name, "max_position_embeddings", None, 0, -1, 2.5, "2048", [], LARGE, NAN)
    yield from field(name, "rms_norm_eps", 0, -1e-6, NAN, INF, "1e-6", True, [])
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        yield from field(name, key, "false", 1, None, [])
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        yield from field(name, key, 2.5, "1", True, {}, LARGE)
    yield from field(name, "eos_token_id", [1, "2"], [[1]], [-1])
    yield from field(name, "model_type", "mistral", "", None, 7, ["llama"])
    yield from field(name, "architectures", ["MistralForCausalLM"], "LlamaForCausalLM", [7], {"a": 1}, [[]])
    yield from field(name, "hidden_act", "gelu", None, 7, ["silu"])
    yield from field(name, "attention_bias", True)  # the file has no biases
    rope = ("rope_parameters",)
    yield from field(name, "rope_theta", 0, -1, NAN, INF, "10000", True, [], inside=rope)
    yield from field(name, "rope_type", "longrope", "x" * 9999, 7, [], {}, inside=rope)
    for kind in ("linear", "dynamic", "llama3", "yarn"):
        yield from field(name, "rope_parameters", {"rope_type": kind})  # without a factor
        for factor in (0, -1, NAN, INF, "8", None, []):
            values = {"rope_type": kind, "factor": factor, "low_freq_factor": 1, "high_freq_factor": 4,
                      "original_max_position_embeddings": 64}  # fmt: skip
            yield f"{name}: {kind} factor {factor!r}", partial(edited, name, rope, values)
    yield from field(name, "rope_parameters", "linear", [1], 7)
    yield from field(name, "quantization_config", "int8", [1], {"quant_method": "bitsandbytes"}, {"quant_method": None},
                     {"quant_method": "fp8"}, {"quant_method": "compressed-tensors"}, {"quant_method": "gptq"},
                     {"quant_method": "awq", "bits": 3, "group_size": 64}, {"quant_method": ["gptq"]})  # fmt: skip
    yield from not_json("generation_config.json")
    yield from field("generation_config.json", "eos_token_id", "2", -1, 2.5, [1, "2"], [[1]], {"a": 1}, True)
    index = "model.safetensors.index.json"
    yield from not_json(index)
    yield from field(index, "weight_map", GONE, None, [], {}, "model.safetensors", 7)
    outside = ("../m/config.json", "/etc/passwd", "..", ".", "", "a/../../x", "x\0y", "n" * 300, "nowhere.safetensors",
               7, None, ["model.safetensors"], "config.json")  # fmt: skip
    for target in outside:
        yield f"{index}: a shard {target!r:.30}", partial(edited, index, ("weight_map", "model.norm.weight"), target)
    yield "a shard that is a folder", _shard_folder
    yield "a shard that is a link out of the folder", _shard_link
    yield "a shard that is a link to itself", _shard_loop
    yield "a shard that is a pipe", _shard_pipe
    yield "a shard twice", _shard_twice


def _first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def _shard_folder(folder: Path) -> None:
    shard = _first_shard(folder)
    shard.unlink()
    shard.mkdir()


def _shard_link(folder: Path) -> None:
    shard = _first_shard(folder)
    shard.rename(folder.parent / "elsewhere.safetensors")
    shard.symlink_to(folder.parent / "elsewhere.safetensors")


def _shard_loop(folder: Path) -> None:
    shard = _first_shard(folder)
    shard.unlink()
    shard.symlink_to(shard.name)


def _shard_pipe(folder: Path) -> None:
    shard = _first_shard(folder)
    shard.unlink()
    os.mkfifo(shard)


def _shard_twice(folder: Path) -> None:
    shard = _first_shard(folder)
    (folder / "more.safetensors").write_bytes(shard.read_bytes())
    edited("model.safetensors.index.json", ("weight_map", "more"), "more.safetensors", folder)


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


def cut(name: str, share: float, folder: Path) -> None:
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def grown(name: str, more: bytes, folder: Path) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes() + more)


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
            [t.name, [*reversed(t.shape)], numbers[t.type], bytes(file.data[t.start : t.start + t.size])]
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
    for value in ("longrope", 7, ["linear"], "linear", "yarn"):
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


def tokenizer_cases() -> Cases:
    name = "tokenizer.json"
    yield from not_json(name)
    yield from not_json("tokenizer_config.json")
    for value in (GONE, None, {}, {"type": "X"}, [], 7):
        yield f"{name}: model {value!r:.20}", partial(edited, name, ("model",), value)
    for value in (GONE, None, [], {}, {"a": -1}, {"a": "x"}, {"a": 2**40}, {"a": 0, "b": 0}, {"a": 5}):
        yield f"{name}: vocab {value!r:.20}", partial(edited, name, ("model", "vocab"), value)
    for value in ("x", [["a"]], [["a", "b", "c"]], [[1, 2]], [["nosuch", "pair"]], ["nosuch pair"], 7):
        yield f"{name}: merges {value!r:.20}", partial(edited, name, ("model", "merges"), value)
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for value in (7, [], {"type": "X"}, {"type": 7}, "x"):
            yield f"{name}: {key} {value!r}", partial(edited, name, (key,), value)
    split = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
    yield "a pattern that is none", partial(edited, name, ("pre_tokenizer",), split)
    for value in (7, [7], [{"id": -1}], [{"id": 99999, "content": "x", "special": True}], [{"content": "x"}]):
        yield f"{name}: added_tokens {value!r:.30}", partial(edited, name, ("added_tokens",), value)
    for text in (
        "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os.system('touch owned') }}", "{{ 1 / 0 }}",
        "{% for", "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{{ lipsum.__globals__.os }}",
        "{{ messages.append(1) }}", "{{ messages[0].update({}) }}", "{% for i in range(10**9) %}{% endfor %}",
        "{{ 'x' * 10**8 }}{{ 'x' * 10**8 }}", "{{ raise_exception('no') }}", "{% extends 'a' %}", "{{ self.x() }}",
        "{{ [].pop() }}", "{{ (messages | attr('__class__')).x }}", "{{ ('%s' * 9) % 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ undefined.name.more }}", "{{ nothing() }}",
    ):  # fmt: skip
        yield f"a template {text[:40]}", partial(written, "chat_template.jinja", text.encode())
    yield "a template that is not UTF-8", partial(written, "chat_template.jinja", b"\xff\xfe")


CASES: dict[str, Callable[[], Cases]] = {
    "config": config_cases,
    "safetensors": safetensors_cases,
    "gguf": gguf_cases,
    "pth": pth_cases,
    "tokenizer": tokenizer_cases,
}
