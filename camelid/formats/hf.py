"""Hugging Face folders: config.json, safetensors (one file or sharded) or `.bin` shards, generation_config.json.

Reading is strict about where shards may live and what they may hold; `.bin` goes through `pickle_reader`, which
executes nothing. Writing builds the folder aside and renames it into place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camelid.disk import read_json
from camelid.errors import FormatError, InputError, about
from camelid.formats.auto_quantized import assembled_auto, read_auto_scheme
from camelid.formats.checkpoint import Checkpoint, Stored
from camelid.formats.compressed import assembled, named_tensors, read_scheme
from camelid.formats.pickle_reader import Archive
from camelid.formats.safetensors_file import OpenFile, write_safetensors
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama

WEIGHTS, BIN = "model.safetensors", "pytorch_model.bin"
# Old checkpoints store RoPE's table, a constant, beside the weights; ours is derived from the config.
IGNORED = ("rotary_emb.inv_freq",)


def open_folder(folder: Path) -> Checkpoint:
    """Open a folder with config.json. Raises InputError naming the file and field at fault."""
    raw = read_json(folder / "config.json")
    quantization = raw.pop("quantization_config", None)
    with about(folder / "config.json"):
        config = LlamaConfig.from_dict(raw)
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    shards = find_shards(folder)
    if not quantization:
        return Checkpoint(folder, "hf", config, lambda: _tensors(shards), generation)
    if isinstance(quantization, dict) and quantization.get("quant_method") in ("gptq", "awq"):
        theirs = read_auto_scheme(folder / "config.json", quantization)
        return Checkpoint(
            folder, "hf", config, lambda: assembled_auto(_tensors(shards), theirs, folder), generation, theirs.label
        )
    scheme = read_scheme(folder / "config.json", quantization)
    return Checkpoint(
        folder, "hf", config, lambda: assembled(_tensors(shards), scheme, folder), generation, scheme.label
    )


def find_shards(folder: Path) -> list[Path]:
    """The weight files of a folder, in order: safetensors if there are any, else `.bin`."""
    for single in (WEIGHTS, BIN):
        if (folder / single).exists():
            return [_inside(folder, single)]
        index = folder / f"{single}.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise FormatError(f"{index}: the field weight_map is missing or empty")
            return [_inside(folder, name) for name in sorted({str(name) for name in weight_map.values()})]
    raise InputError(f"{folder} has a config.json but no weights: neither {WEIGHTS} nor {BIN}, nor an index of them")


def _inside(folder: Path, name: str) -> Path:
    """A shard's path, refused when it would leave the folder (transformers issue 47176)."""
    path = folder / name
    if Path(name).name != name or name in ("", ".", "..") or len(name) > 200 or "\0" in name:
        raise FormatError(f"{folder}: the index names the shard {name[:200]!r}; a shard must be a plain file name")
    if not path.is_file():
        raise FormatError(f"{path} is missing: the download is incomplete")
    # Download caches keep each model as links into a sibling blobs folder; other targets are refused.
    real, root = path.resolve(), folder.resolve()
    if real.parent != root and real.parent.name != "blobs":
        raise FormatError(f"{path} is a link that leaves the model folder, to {real}")
    return path


def _tensors(shards: list[Path]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    opened = OpenFile()
    for shard in shards:
        for name, tensor in _shard(shard, opened):
            if name.endswith(IGNORED):
                continue
            ours = name.removeprefix("model.")
            if ours in found:
                raise FormatError(f"{shard}: tensor {name!r} is in this folder twice: which of the two is meant?")
            found[ours] = tensor
    return found


def _shard(path: Path, opened: OpenFile) -> Iterator[tuple[str, Stored]]:
    if path.suffix == ".safetensors":
        yield from opened.tensors(path)
        return
    archive = Archive(path)
    for name, described in archive.tensors.items():
        yield name, Stored(described.size, described.storage.dtype, partial(archive.read, name))


def hf_name(name: str) -> str:
    """A parameter's name in a Hugging Face file."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def save(
    model: Llama, folder: str | Path, *, generation: dict[str, Any] | None = None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write `model` as a Hugging Face folder: transformers, vLLM and llama.cpp's converter open it unchanged.

    Quantised layers are written as they are kept. The folder appears complete or not at all. It must not exist, be
    empty, or be a model that camelid wrote.
    """
    from camelid.artifact import new_folder, write_manifest

    with new_folder(Path(folder), "model") as out:
        tensors, scheme = named_tensors(model)
        quantization = scheme.to_dict() if scheme else None
        known = write_weights(model.config, tensors, out, generation, max_shard_bytes, quantization)
        write_manifest(out, "model", known=known, parameters=model.num_parameters())


def write_weights(
    config: LlamaConfig,
    tensors: Mapping[str, Tensor | Stored],
    out: Path,
    generation: dict[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """config.json, generation_config.json and safetensors into the existing folder `out`. `tensors` go by the model's
    own names, a tied lm_head once, as the embedding; those on disk are read one by one. `quantization` is config.json's
    `quantization_config`. Returns the SHA-256 of each weights file."""
    shards: list[dict[str, Tensor | Stored]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][hf_name(name)] = tensor
        filled += tensor.nbytes
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        digests[file] = write_safetensors(out / file, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    dtype = next(iter(tensors.values())).dtype
    named = str(dtype).removeprefix("torch.")
    described = config.to_dict() | {"dtype": named, "torch_dtype": named}  # the second until 2025
    described |= {} if quantization is None else {"quantization_config": dict(quantization)}
    (out / "config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = {name: value for name, value in ids.items() if value is not None} | (generation or {})
    (out / "generation_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return digests


def dtype_named(name: str) -> torch.dtype:
    """ "bfloat16" -> torch.bfloat16. Raises InputError for another name."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name not in known:
        raise InputError(f"no dtype {name!r}; choose one of {', '.join(known)}")
    return known[name]
