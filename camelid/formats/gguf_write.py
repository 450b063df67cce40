"""Write GGUF (ggml's docs/gguf.md, version 3): one file with weights, tokenizer and chat template, for llama.cpp and
whoever else reads it.

Tensors are written one after the other, so the file may be larger than memory. Vectors stay float32, as llama.cpp's own
converter has them; q and k go back to the interleaved pairing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from camelid.disk import new_file
from camelid.errors import InputError
from camelid.formats.checkpoint import Stored, dense
from camelid.formats.gguf import LAYER_NAMES, STOPS, TOP_NAMES
from camelid.formats.gguf_blocks import BLOCKS
from camelid.formats.gguf_file import PLAIN, TYPE_NAMES
from camelid.formats.gguf_pack import block_type, quantize
from camelid.model.config import LlamaConfig, RopeScaling
from camelid.model.quantized import all_finite
from camelid.model.rope import half_split_to_interleaved, inverse_frequencies
from camelid.tokenizer.gguf_fields import tokenizer_metadata
from camelid.tokenizer.tokenizer import Tokenizer

ALIGNMENT = 32
# What a file of mostly this type is called by llama.cpp (llama.h, llama_ftype).
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "BF16": 32}
_KINDS = {name: number for number, name in TYPE_NAMES.items()}


def write(
    config: LlamaConfig,
    weights: Mapping[str, Tensor | Stored],
    tokenizer: Tokenizer,
    out: Path,
    kind: str,
    stops: Sequence[int] = (),
) -> str:
    """Write `out`, matrices as `kind` (a name of FILE_TYPES). `weights` go by the model's own names, a tied lm_head
    once, as the embedding; those on disk are read one by one. `stops` are the ids that end a text, of which the format
    has words for three. Returns the file's SHA-256. Raises InputError for a model or a tokenizer that GGUF has no words
    for."""
    if kind not in FILE_TYPES:
        raise InputError(f"GGUF matrices cannot be written as {kind!r}; choose one of {', '.join(FILE_TYPES)}")
    if out.exists():  # it may be the very model that is read
        raise InputError(f"{out} exists: choose another --out, or remove it")
    tokenizer.check_rows(config.vocab_size, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    metadata = _metadata(config, out.stem, kind) | tokenizer_metadata(tokenizer, config.vocab_size)
    further = [i for i in stops if i != metadata.get(STOPS[0])]
    metadata |= dict(zip(STOPS[1:] if STOPS[0] in metadata else STOPS, further, strict=False))
    tensors = dict(_named(config, weights))
    layers, tied = config.num_hidden_layers, "output.weight" not in tensors
    kinds = {  # vectors are float32
        name: block_type(kind, name, tensor.shape[-1], layers, tied) if len(tensor.shape) > 1 else "F32"
        for name, tensor in tensors.items()
    }
    infos, offset = [], 0
    for name, tensor in tensors.items():
        infos.append(_string(name) + struct.pack("<I", len(tensor.shape)))
        infos.append(struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)))
        infos.append(struct.pack("<IQ", _KINDS[kinds[name]], offset))
        offset += _padded(_size(tensor, kinds[name]))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_string(key) + _value(value) for key, value in metadata.items()) + b"".join(infos)

    def parts() -> Iterator[bytes | memoryview]:
        yield head.ljust(_padded(len(head)), b"\0")
        for name, tensor in tensors.items():
            size = _size(tensor, kinds[name])
            yield _bytes(dense(tensor), kinds[name], config, name)
            yield bytes(_padded(size) - size)

    return new_file(out, parts())


def _named(config: LlamaConfig, weights: Mapping[str, Tensor | Stored]) -> Iterator[tuple[str, Tensor | Stored]]:
    """Tensors under GGUF's names, and llama3's RoPE scaling as the divisors that llama.cpp expects."""
    layer = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
    top = {ours: theirs for theirs, ours in TOP_NAMES.items()}
    if config.rope_scaling.rope_type == "llama3":
        scaled, _ = inverse_frequencies(config)
        plain = 1.0 / config.rope_theta ** (torch.arange(0, config.head_size, 2).float() / config.head_size)
        yield "rope_freqs.weight", plain / scaled
    for name, weight in weights.items():
        stem, _, leaf = name.rpartition(".")
        parts = stem.split(".", 2)
        theirs = f"blk.{parts[1]}.{layer[parts[2]]}" if parts[0] == "layers" else top[stem]
        yield f"{theirs}.{leaf}", weight


def _size(tensor: Tensor | Stored, kind: str) -> int:
    count = tensor.nbytes // tensor.dtype.itemsize
    if kind in BLOCKS:
        values, width, _ = BLOCKS[kind]
        return count // values * width
    return count * (4 if kind == "F32" else 2)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _bytes(tensor: Tensor, kind: str, config: LlamaConfig, name: str) -> memoryview:
    if ".attn_q." in name or ".attn_k." in name:
        tensor = half_split_to_interleaved(
            tensor, config.num_attention_heads if ".attn_q." in name else config.kv_heads
        )
    tensor = tensor.cpu().contiguous()
    if kind in BLOCKS:
        values = tensor.float()
        if not all_finite(values):
            raise InputError(f"the tensor {name} holds NaN or infinity, which no {kind} keeps")
        return np.ascontiguousarray(quantize(kind, values.numpy())).data.cast("B")
    return memoryview(tensor.to(PLAIN[kind]).flatten().view(torch.uint8).numpy().data)


def _metadata(config: LlamaConfig, name: str, kind: str) -> dict[str, Any]:
    scaling = config.rope_scaling
    known = RopeScaling(scaling.rope_type, factor=scaling.factor)
    if scaling.rope_type != "default":
        trained = 8192 if scaling.rope_type == "llama3" else scaling.original_max_position_embeddings
        known = replace(known, original_max_position_embeddings=trained)
    if scaling != known or scaling.rope_type == "dynamic":
        raise InputError(f"GGUF has no word for this {scaling.rope_type} RoPE scaling: convert to hf")
    found: dict[str, Any] = {
        "general.architecture": "llama", "general.name": name, "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2, "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings, "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers, "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads, "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.attention.key_length": config.head_size, "llama.attention.value_length": config.head_size,
        "llama.rope.freq_base": float(config.rope_theta), "llama.rope.dimension_count": config.head_size,
    }  # fmt: skip
    if scaling.rope_type in ("linear", "yarn"):
        found |= {"llama.rope.scaling.type": scaling.rope_type, "llama.rope.scaling.factor": float(scaling.factor)}
        if scaling.original_max_position_embeddings:
            found["llama.rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
    return found


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A typed metadata value (gguf.md's numbers: 4 uint32, 5 int32, 6 float32, 7 bool, 8 string, 9 array)."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    code, number = ("f", 6) if isinstance(value[0], float) else ("i", 5)
    return struct.pack("<IIQ", 9, number, len(value)) + struct.pack(f"<{len(value)}{code}", *value)
