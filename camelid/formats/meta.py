"""Meta's own folders, both ways: params.json, consolidated.00.pth …, tokenizer.model (llama/model.py, llama3/model.py).

The shards of a model hold parts of each matrix, cut along rows or along columns. q and k are in the interleaved
pairing, everything else is as ours. A `.pth` file is read by `pickle_reader`, tensor by tensor, and never executed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camelid.disk import read_json
from camelid.errors import FormatError, InputError, about
from camelid.formats.checkpoint import Checkpoint, Stored, dense
from camelid.formats.pickle_reader import Archive
from camelid.formats.pickle_writer import write_archive
from camelid.model.config import LlamaConfig, RopeScaling
from camelid.model.rope import half_split_to_interleaved, interleaved_to_half_split

PARAMS, GENERATION = "params.json", "generation_config.json"
CONTEXT = "max_position_embeddings"  # ours, in GENERATION: Meta's loaders say it themselves
LLAMA3_ROWS = 100_000  # more than any vocabulary before Llama 3
# Theirs, ours, and along which dimension shards cut it; None: each has all of it.
_LAYER = [
    ("attention.wq", "self_attn.q_proj", 0), ("attention.wk", "self_attn.k_proj", 0),
    ("attention.wv", "self_attn.v_proj", 0), ("attention.wo", "self_attn.o_proj", 1),
    ("feed_forward.w1", "mlp.gate_proj", 0), ("feed_forward.w2", "mlp.down_proj", 1),
    ("feed_forward.w3", "mlp.up_proj", 0), ("attention_norm", "input_layernorm", None),
    ("ffn_norm", "post_attention_layernorm", None),
]  # fmt: skip
_SMALL_32 = {
    (2048, 16),
    (3072, 28),
}  # Llama 3.2's 1B and 3B, (dim, n_layers): their RoPE factor is 32, and they are tied
LLAMA3_STOPS = [128001, 128008, 128009]


def is_meta(folder: Path) -> bool:
    """Whether a folder is one of Meta's."""
    return (folder / PARAMS).is_file() and not (folder / "config.json").exists()


def open_folder(folder: Path) -> Checkpoint:
    """Open a folder with params.json. Raises FormatError naming the file and the field or tensor at fault."""
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise FormatError(f"{folder} has {PARAMS} but no consolidated.00.pth")
    if [f.name for f in files] != [f"consolidated.{n:02}.pth" for n in range(len(files))]:
        raise FormatError(f"{folder}: the shards are {', '.join(f.name for f in files)}: one is missing")
    archives = [Archive(file) for file in files]
    config = _config(folder / PARAMS, archives)
    path = folder / GENERATION
    generation = read_json(path) if path.exists() else {}
    ids = {name: generation[name] for name in ("bos_token_id", "eos_token_id") if generation.get(name) is not None}
    context = generation.pop(CONTEXT, None)
    with about(path):
        config = replace(config, **ids)
        config = config if context is None else replace(config, max_position_embeddings=context)

    def tensors() -> dict[str, Stored]:
        found = {}
        for theirs, ours, cut in _names(config, archives):
            shape, dtype = _whole(folder, archives, theirs, ours, cut, config)
            found[ours] = Stored(shape, dtype, partial(_joined, archives, theirs, cut, _heads(config, ours)))
        return found

    stops: Any = LLAMA3_STOPS if config.vocab_size > LLAMA3_ROWS else config.eos_token_id
    return Checkpoint(folder, "meta", config, tensors, {"eos_token_id": stops, **generation})


def _config(path: Path, archives: list[Archive]) -> LlamaConfig:
    params = read_json(path)

    def need(key: str, default: int | None = None) -> int:
        value = params.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 24:
            raise FormatError(f"{path}: {key} is {value!r}, not a whole number above 0")
        return value

    dim, layers, heads = need("dim"), need("n_layers"), need("n_heads")
    rows = [_shape(a, "tok_embeddings.weight") for a in archives]
    # Llama 1 and 2 cut the embedding by columns, Llama 3 by rows.
    vocab = rows[0][0] if rows[0][1] * len(rows) == dim else sum(r[0] for r in rows)

    def number(key: str, default: float) -> float:
        value = params.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise FormatError(f"{path}: {key} is {value!r}, not a number above 0")
        return float(value)

    theta, scaled = number("rope_theta", 10000.0), bool(params.get("use_scaled_rope", False))
    third, long = vocab > LLAMA3_ROWS, theta > 100_000  # CodeLlama's turns are slow too
    eps = number("norm_eps", 1e-5)
    first = not third and not long and (eps == 1e-6 or (dim == 8192 and "n_kv_heads" not in params))
    scaling = RopeScaling()
    if scaled:
        factor = 32.0 if (dim, layers) in _SMALL_32 else 8.0
        scaling = RopeScaling("llama3", factor=factor, original_max_position_embeddings=8192)
    context = 131072 if scaled else 8192 if third else 16384 if long else 2048 if first else 4096
    width = _shape(archives[0], "layers.0.feed_forward.w1.weight")[0] * len(archives)
    with about(path):
        return LlamaConfig(
            vocab_size=vocab, hidden_size=dim, intermediate_size=width, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=need("n_kv_heads", heads),
            max_position_embeddings=need("max_seq_len", context), rope_theta=theta, rope_scaling=scaling,
            rms_norm_eps=eps, tie_word_embeddings=_is_tied(archives, third and (dim, layers) in _SMALL_32),
            bos_token_id=128000 if third else 1, eos_token_id=128001 if third else 2,
        )  # fmt: skip


def _is_tied(archives: list[Archive], likely: bool) -> bool:
    """Whether the output projection is the embedding: it is not in the files, or (`likely`) once more."""
    if any("output.weight" not in archive.tensors for archive in archives):
        return True
    return likely and all(torch.equal(a.read("output.weight"), a.read("tok_embeddings.weight")) for a in archives)


def _shape(archive: Archive, name: str) -> tuple[int, ...]:
    if name not in archive.tensors:
        raise FormatError(f"{archive.path}: tensor {name!r} is missing")
    shape = archive.tensors[name].size
    if len(shape) != 2:
        raise FormatError(f"{archive.path}: tensor {name!r} has {len(shape)} dimensions, not 2")
    return shape


def _names(config: LlamaConfig, archives: list[Archive]) -> Iterator[tuple[str, str, int | None]]:
    """Every tensor that the files should hold; raises FormatError for one that no LLaMA has."""
    by_columns = _shape(archives[0], "tok_embeddings.weight")[1] != config.hidden_size
    found = [
        ("tok_embeddings.weight", "embed_tokens.weight", 1 if by_columns else 0),
        ("norm.weight", "norm.weight", None),
    ]
    if not config.tie_word_embeddings:
        found.append(("output.weight", "lm_head.weight", 0))
    for n in range(config.num_hidden_layers):
        found += [(f"layers.{n}.{a}.weight", f"layers.{n}.{b}.weight", cut) for a, b, cut in _LAYER]
    known = {name for name, _, _ in found} | {"output.weight"}
    for archive in archives:
        # Llama 2 keeps the rotations of all layers beside them, LLaMA 1 each layer's own: the config gives them again.
        if strange := sorted(n for n in archive.tensors.keys() - known if not n.endswith("rope.freqs")):
            raise FormatError(f"{archive.path}: tensor {strange[0]!r} is none of a LLaMA's")
    yield from found


def _whole(
    folder: Path, archives: list[Archive], theirs: str, ours: str, cut: int | None, config: LlamaConfig
) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and dtype of what the shards' parts of a tensor make together."""
    for archive in archives:
        if theirs not in archive.tensors:
            raise FormatError(f"{archive.path}: tensor {theirs!r} is missing")
    parts = [a.tensors[theirs] for a in archives]
    shape, dtype = list(parts[0].size), parts[0].storage.dtype
    if cut is None:
        return tuple(shape), dtype
    shapes = [[n for d, n in enumerate(p.size) if d != cut] for p in parts]
    if any(s != shapes[0] or len(p.size) != 2 or p.storage.dtype != dtype for s, p in zip(shapes, parts, strict=True)):
        told = ", ".join(f"{list(p.size)} {p.storage.dtype}".replace("torch.", "") for p in parts)
        raise FormatError(f"{folder}: the parts of {theirs!r} do not fit together: {told}")
    shape[cut] = sum(p.size[cut] for p in parts)
    heads = _heads(config, ours)
    if heads and shape[0] % (2 * heads):
        raise FormatError(f"{folder}: {theirs!r} has {shape[0]} rows, which {heads} heads do not share evenly")
    return tuple(shape), dtype


def _joined(archives: list[Archive], theirs: str, cut: int | None, heads: int | None) -> Tensor:
    if cut is None:
        return archives[0].read(theirs)
    parts = [a.read(theirs) for a in archives]
    whole = torch.cat(parts, cut) if len(parts) > 1 else parts[0]
    return interleaved_to_half_split(whole, heads) if heads else whole


def _heads(config: LlamaConfig, name: str) -> int | None:
    """How many heads a tensor's rows are, where their pairing differs from ours."""
    return {"q_proj": config.num_attention_heads, "k_proj": config.kv_heads}.get(name.split(".")[-2])


def write(
    config: LlamaConfig,
    weights: Mapping[str, Tensor | Stored],
    out: Path,
    tokenizer_model: Path | None,
    shards: int = 1,
) -> None:
    """Write params.json and `shards` consolidated files into the existing folder `out`, in the weights' dtype, with the
    tokenizer.model if there is one. `weights` go by the model's own names; those on disk are read one by one, once for
    every shard. Raises InputError for a shape that Meta's code cannot say or cut."""
    (out / PARAMS).write_text(json.dumps(params_of(config)) + "\n", encoding="utf-8")
    for name, size in (("num_attention_heads", config.num_attention_heads), ("num_key_value_heads", config.kv_heads),
                       ("intermediate_size", config.intermediate_size), ("vocab_size", config.vocab_size)):  # fmt: skip
        if shards < 1 or size % shards:
            raise InputError(f"--shards {shards} does not divide the model's {name} {size}")
    third = config.vocab_size > LLAMA3_ROWS
    tensors = dict(weights)
    tensors.setdefault("lm_head.weight", tensors["embed_tokens.weight"])
    names: list[tuple[str, str, int | None]] = [
        ("tok_embeddings.weight", "embed_tokens.weight", 0 if third else 1),
        ("norm.weight", "norm.weight", None), ("output.weight", "lm_head.weight", 0),
    ]  # fmt: skip
    for n in range(config.num_hidden_layers):
        names += [(f"layers.{n}.{a}.weight", f"layers.{n}.{b}.weight", cut) for a, b, cut in _LAYER]
    for shard in range(shards):
        parts = {}
        for theirs, ours, cut in names:
            shape = list(tensors[ours].shape)
            if cut is not None:
                shape[cut] //= shards
            read = partial(_part, tensors[ours], _heads(config, ours), cut, shard, shards)
            parts[theirs] = Stored(tuple(shape), tensors[ours].dtype, read)
        write_archive(out / f"consolidated.{shard:02}.pth", parts)
    if tokenizer_model is not None:
        shutil.copyfile(tokenizer_model, out / "tokenizer.model")


def _part(weight: Tensor | Stored, heads: int | None, cut: int | None, shard: int, shards: int) -> Tensor:
    """One shard's part of a weight."""
    tensor = dense(weight)
    tensor = half_split_to_interleaved(tensor, heads) if heads else tensor
    return tensor if cut is None else tensor.chunk(shards, cut)[shard]


def params_of(config: LlamaConfig) -> dict[str, Any]:
    """params.json of a shape: only what Meta's code of its time takes, for it refuses any other word (LLaMA 1's knows
    no `n_kv_heads`, Llama 2's no `rope_theta`). Raises InputError for what it has no word for."""
    if config.attention_bias or config.mlp_bias:
        raise InputError("Meta's format has no biases, and this model has some: convert it to hf")
    if config.head_size * config.num_attention_heads != config.hidden_size:
        raise InputError(
            f"Meta's format wants heads of dim / n_heads; this model's have {config.head_size}: convert to hf"
        )
    kind, small = config.rope_scaling.rope_type, (config.hidden_size, config.num_hidden_layers) in _SMALL_32
    usual = RopeScaling("llama3", factor=32.0 if small else 8.0, original_max_position_embeddings=8192)
    if config.rope_scaling not in (RopeScaling(), usual):
        raise InputError(
            f"Meta's format cannot say this RoPE scaling, {kind!r} by {config.rope_scaling.factor:g}: convert to hf"
        )
    found: dict[str, Any] = {
        "dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size, "norm_eps": config.rms_norm_eps,
    }  # fmt: skip
    if config.kv_heads != config.num_attention_heads:
        found["n_kv_heads"] = config.kv_heads
    if config.rope_theta != 10000.0 or config.vocab_size > LLAMA3_ROWS:  # llama3's code has another default
        found["rope_theta"] = config.rope_theta
    if kind == "llama3":
        found["use_scaled_rope"] = True
    return found | feed_forward_of(config.hidden_size, config.intermediate_size)


def feed_forward_of(dim: int, intermediate: int) -> dict[str, Any]:
    """The multiple and the factor by which Meta's rule makes `intermediate` of `dim`: 2/3 of 4 dim, times the factor,
    rounded up to the multiple."""
    plain = int(2 * 4 * dim / 3)
    for multiple in (256, 1024, 4096, 1):
        if -(-plain // multiple) * multiple == intermediate:
            return {"multiple_of": multiple}
        for factor in (1.3, 1.4, 1.5):
            if -(-int(factor * plain) // multiple) * multiple == intermediate:
                return {"multiple_of": multiple, "ffn_dim_multiplier": factor}
    return {"multiple_of": 1, "ffn_dim_multiplier": (intermediate + 0.5) / plain}
