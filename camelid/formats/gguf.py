"""Read GGUF (ggml's docs/gguf.md, versions 2 and 3): metadata, and tensors as float32 or in their own dtype.

Nothing is allocated from a number the file declares: every count is checked against the bytes that are left, and
every tensor must end within the file. Quantised blocks (`gguf_blocks.py`) are expanded to float32. q and k weights
are stored in Meta's interleaved pairing and are permuted to ours here.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camelid.errors import FormatError, about
from camelid.formats.checkpoint import Checkpoint, Stored
from camelid.formats.gguf_blocks import BLOCKS, WHOLE, expand, whole
from camelid.model.config import LlamaConfig, RopeScaling
from camelid.model.quantized import GROUP, Integers, round_to_nearest
from camelid.model.rope import interleaved_to_half_split, inverse_frequencies
from camelid.tokenizer.gguf_fields import ENDS

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


# Fields of RoPE scaling by the values that change nothing (llama.cpp's defaults).
UNFELT = {"attn_factor": (1.0,), "yarn_attn_factor": (1.0,), "yarn_ext_factor": (1.0, -1.0)}
STOPS = tuple(f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` in torch order, `start` and `size` in bytes of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    size: int


@dataclass(frozen=True)
class GGUF:
    """A parsed file: metadata by key, tensors by name, and the mapped bytes."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: mmap.mmap

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
            return round_to_nearest(self.tensor(name), 8, GROUP)
        with self._raw(info) as raw:
            parts = whole(info.type, raw)
        rows = info.shape[0]
        q, scale, least = (None if part is None else torch.from_numpy(part).view(rows, -1) for part in parts)
        assert q is not None
        assert scale is not None
        if not all(bool(part.isfinite().all()) for part in (scale, least) if part is not None):
            raise FormatError(f"{self.path}: tensor {name!r} has a scale that is NaN or infinite: copy the file again")
        return Integers(q, scale, None, WHOLE[info.type][0], least)

    @contextmanager
    def _raw(self, info: TensorInfo) -> Iterator[NDArray[np.uint8]]:
        """A tensor's bytes, as they lie in the file. Afterwards they are no longer the process's."""
        yield np.frombuffer(self.data, np.uint8, info.size, info.start)
        if hasattr(mmap, "MADV_DONTNEED"):
            first = info.start // mmap.PAGESIZE * mmap.PAGESIZE
            with suppress(OSError):
                self.data.madvise(mmap.MADV_DONTNEED, first, info.start + info.size - first)


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
        info = TensorInfo(name, shape, kind, base + offset, _byte_size(path, name, shape, kind))
        if info.start + info.size > len(r.data):
            raise FormatError(f"{path}: tensor {name!r} ends past the end of the file: truncated, copy it again")
        if name in tensors:
            raise FormatError(f"{path}: two tensors are named {name!r}")
        tensors[name] = info
    return GGUF(path, metadata, tensors, r.data)


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


LAYER_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
TOP_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}


def our_name(name: str) -> str:
    """A GGUF tensor's name as `Llama.state_dict()` has it; unknown names come back unchanged, to be refused."""
    stem, _, leaf = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{leaf}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{leaf}"
    return name


def open_file(path: Path) -> Checkpoint:
    """Open a GGUF model of architecture `llama`. Raises FormatError naming the field at fault."""
    file = parse(path)
    with about(path):
        config = _config(file)

    def ordered(name: str, rows: Tensor) -> Tensor:
        heads = {".q_proj.": config.num_attention_heads, ".k_proj.": config.kv_heads}
        of = next((heads[part] for part in heads if part in our_name(name)), None)
        if of is not None and rows.dim() > 2:
            raise FormatError(f"{path}: tensor {name!r} has {rows.dim()} dimensions")
        return rows if of is None else interleaved_to_half_split(rows, of)

    def read(name: str) -> Tensor:
        return ordered(name, file.tensor(name))

    def integers(name: str) -> Integers:
        found = file.integers(name)
        least = None if found.least is None else ordered(name, found.least)
        return replace(found, packed=ordered(name, found.packed), scale=ordered(name, found.scale), least=least)

    def stored(name: str, info: TensorInfo) -> Stored:
        if info.type in PLAIN:
            return Stored(info.shape, PLAIN[info.type], partial(read, name))
        return Stored(info.shape, torch.float32, partial(read, name), partial(integers, name))

    def tensors() -> dict[str, Stored]:
        return {
            our_name(name): stored(name, info)
            for name, info in file.tensors.items()
            if name != "rope_freqs.weight"  # llama3 scaling as a table, which the config's gives again
        }

    return Checkpoint(path, "gguf", config, tensors, {"eos_token_id": _stops(file)}, _rounded(file))


def _rounded(file: GGUF) -> str | None:
    """The types of the rounded tensors, the one of most bytes first."""
    sizes: Counter[str] = Counter()
    for info in file.tensors.values():
        if info.type not in PLAIN:
            sizes[info.type] += info.size
    return ", ".join(kind for kind, _ in sizes.most_common()) or None


def _stops(file: GGUF) -> list[int] | None:
    """Every id that ends a text: of the text, of a turn, of a message to a tool."""
    found = [file.metadata[key] for key in STOPS if key in file.metadata]
    several = file.metadata.get("tokenizer.ggml.eos_token_ids")
    found += several if isinstance(several, list) else []
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):  # as llama.cpp: who names one end only means these too
        found += [i for i, text in enumerate(tokens) if isinstance(text, str) and text in ENDS]
    bad = next((i for i in found if isinstance(i, bool) or not isinstance(i, int) or i < 0), None)
    if bad is not None:
        raise FormatError(f"{file.path}: an end token's id is {bad!r}, which is no id")
    return list(dict.fromkeys(found)) or None


def _config(file: GGUF) -> LlamaConfig:
    meta = file.metadata
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise FormatError(f"general.architecture is {architecture!r}; camelid opens 'llama' only")
    if isinstance(parts := meta.get("split.count"), int) and parts > 1:  # joined ones say 0
        raise FormatError(f"it is one of {parts} files of a model: join them first (llama-gguf-split --merge)")

    def number(key: str, default: float) -> float:
        value = meta.get(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FormatError(f"llama.{key} is {value!r}, not a number")
        return float(value)

    def need(key: str) -> int:
        value = meta.get(f"llama.{key}")
        if isinstance(value, bool) or not isinstance(value, int):
            raise FormatError(f"llama.{key} is {value!r}, not a whole number")
        return value

    if "token_embd.weight" not in file.tensors:
        raise FormatError("tensor 'token_embd.weight' is missing")
    heads = need("attention.head_count")
    if heads < 1:
        raise FormatError(f"llama.attention.head_count is {heads}")
    vocab_size = file.tensors["token_embd.weight"].shape[0]
    words = meta.get("tokenizer.ggml.tokens")
    if isinstance(words, list) and len(words) > vocab_size:
        raise FormatError(f"the vocabulary has {len(words)} tokens, the embedding {vocab_size} rows")
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=need("embedding_length"),
        intermediate_size=need("feed_forward_length"),
        num_hidden_layers=need("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=meta.get("llama.attention.head_count_kv", heads),
        head_dim=meta.get("llama.attention.key_length", need("embedding_length") // heads),
        max_position_embeddings=need("context_length"),
        rope_theta=number("rope.freq_base", 10000.0),
        # float32 on disk: 1e-5 reads as 9.99999974e-06
        rms_norm_eps=float(f"{number('attention.layer_norm_rms_epsilon', 1e-5):.6g}"),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=meta.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=meta.get("tokenizer.ggml.padding_token_id"),
    )
    return replace(config, rope_scaling=_scaling(file, config))


def _scaling(file: GGUF, config: LlamaConfig) -> RopeScaling:
    """What the table says, or the metadata as llama.cpp reads it. Raises FormatError for what camelid does not read."""
    if "rope_freqs.weight" in file.tensors:
        return _of_table(file.tensor("rope_freqs.weight").float().flatten(), config)
    start = "llama.rope.scaling."
    said = {key.removeprefix(start): value for key, value in file.metadata.items() if key.startswith(start)}
    factor = said.pop("factor", file.metadata.get("llama.rope.scale_linear"))  # the latter in files of 2023
    kind = said.pop("type", "linear") or "none"
    said.pop("finetuned", None)
    found: dict[str, Any] = {
        "rope_type": kind, "factor": factor,
        "original_max_position_embeddings": said.pop("original_context_length", None),
    }  # fmt: skip
    if kind == "yarn":
        found |= {name: said.pop(f"yarn_{name}") for name in ("beta_fast", "beta_slow") if f"yarn_{name}" in said}
    if kind not in ("none", "linear", "yarn"):
        raise FormatError(f"llama.rope.scaling.type is {kind!r}; camelid reads 'linear' and 'yarn'")
    if kind == "none" or factor in (None, 0.0, 1.0):
        return RopeScaling()
    said = {name: value for name, value in said.items() if value not in UNFELT.get(name, ())}
    if said:
        name, value = said.popitem()
        raise FormatError(f"{start}{name} is {value!r}, which camelid does not read")
    return RopeScaling.from_dict(found)


def _of_table(table: Tensor, config: LlamaConfig) -> RopeScaling:
    """Llama 3's scaling from the divisors of each pair that llama.cpp stores of it: the factor is told by the slowest
    pair, and the rest of the table must follow."""
    plain, _ = inverse_frequencies(config)
    scaling = RopeScaling("llama3", original_max_position_embeddings=8192)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    turns = 8192 * float(plain[-1]) / (2 * math.pi)
    kept = min(max((turns - scaling.low_freq_factor) / span, 0.0), 1.0)  # how much of the slowest is not divided
    share = 1 / float(table[-1])
    if share > kept:
        scaling = replace(scaling, factor=round((1 - kept) / (share - kept), 4))
    scaled, _ = inverse_frequencies(replace(config, rope_scaling=scaling))
    if table.shape != plain.shape or not torch.allclose(plain / scaled, table, rtol=1e-3):
        raise FormatError("rope_freqs.weight is a table that no scaling of Llama 3.1 or 3.2 gives: it is not read")
    return scaling
