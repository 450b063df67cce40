"""A LLaMA in a GGUF file (`gguf_file.py`), under the names, in the order and with the config that ours has.

q and k weights are stored in Meta's interleaved pairing and are permuted to ours here.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camelid.errors import FormatError, about
from camelid.formats.checkpoint import Checkpoint, Stored
from camelid.formats.gguf_file import GGUF, PLAIN, TensorInfo, integer_bytes, parse_whole
from camelid.model.config import LlamaConfig, RopeScaling
from camelid.model.quantized import Integers
from camelid.model.rope import interleaved_to_half_split, inverse_frequencies
from camelid.tokenizer.gguf_fields import ENDS

# Fields of RoPE scaling by the values that change nothing (llama.cpp's defaults).
UNFELT = {"attn_factor": (1.0,), "yarn_attn_factor": (1.0,), "yarn_ext_factor": (1.0, -1.0)}
STOPS = tuple(f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))


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
    file = parse_whole(path)
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
        return Stored(info.shape, torch.float32, partial(read, name), partial(integers, name), integer_bytes(info))

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
