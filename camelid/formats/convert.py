"""Any MODEL as a folder that stands alone, Hugging Face's or Meta's, or as one GGUF file: weights and tokenizer.

Weights go from file to file one by one, so a model may be larger than memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from camelid.artifact import new_folder, parts, write_manifest
from camelid.errors import InputError
from camelid.formats import gguf_write, meta
from camelid.formats.adapter import is_adapter
from camelid.formats.checkpoint import Stored, named_weights
from camelid.formats.hf import write_weights
from camelid.formats.load import generation_of, load_tokenizer, open_model, resolve, stop_ids
from camelid.model.config import LlamaConfig
from camelid.report.progress import Advance, progress

Weights = Mapping[str, Tensor | Stored]


def write_model(
    config: LlamaConfig, weights: Weights, source: Path, out: str | Path, inputs: list[Path], **facts: Any
) -> str:
    """Write `out`: a model's weights by its own names, with the tokenizer and the stop ids of `source`. Returns the
    SHA-256 of its first weights file."""
    with new_folder(Path(out), "model") as folder:
        known = write_weights(config, weights, folder, generation_of(source))
        load_tokenizer(source).save(folder)
        write_manifest(folder, "model", inputs, known=known, parameters=config.num_parameters(), **facts)
    return next(iter(known.values()))


def convert(
    source: str | Path, out: str | Path, to: str = "hf", shards: int = 1, kind: str | None = None, quiet: bool = True
) -> dict[str, Any]:
    """Write any MODEL as a Hugging Face folder (`hf`) or as one of Meta's (`meta`, in `shards` files), in the file's
    dtype (quantised ones: float32), or as a GGUF file (`gguf`) with matrices of `kind`, by default F16.

    Raises InputError for what the format cannot say, and FormatError for weights that are missing or do not fit."""
    path = resolve(source)
    if path.is_dir() and is_adapter(path):
        raise InputError(f"{path} is an adapter: camelid merge puts it into its base")
    if shards != 1 and to != "meta":
        raise InputError(f"--shards {shards} is for --to meta")
    if kind is not None and to != "gguf":
        raise InputError(f"--type {kind} is for --to gguf; camelid quantize rounds a folder's weights")
    checkpoint = open_model(path)
    config, weights = checkpoint.config, named_weights(checkpoint)
    with progress("convert", _read_bytes(config, weights, to, shards), quiet) as advance:
        followed = _followed(weights, advance)
        if to == "gguf":
            digest = gguf_write.write(config, followed, load_tokenizer(path), Path(out), kind or "F16", stop_ids(path))
        elif to == "meta":
            digest = _write_meta(config, followed, path, Path(out), shards)
        else:
            digest = write_model(config, followed, path, out, [path])
    return {
        "out": str(out),
        "before": {"bytes": size_of(path)},
        "after": {"bytes": size_of(Path(out))},
        "digest": digest,
    }


def _read_bytes(config: LlamaConfig, weights: Mapping[str, Stored], to: str, shards: int) -> int:
    """What is read in all: each of Meta's files has a part of every matrix, and a tied one under both names."""
    once = sum(weight.nbytes for weight in weights.values())
    if to != "meta":
        return once
    return shards * (once + (weights["embed_tokens.weight"].nbytes if config.tie_word_embeddings else 0))


def _followed(weights: Mapping[str, Stored], advance: Advance) -> dict[str, Stored]:
    """The same weights, which tell when they are read."""
    done = 0

    def read(name: str) -> Tensor:
        nonlocal done
        found = weights[name].dense()
        done += weights[name].nbytes
        advance(done, name)
        return found

    return {name: replace(weight, read=partial(read, name)) for name, weight in weights.items()}


def _write_meta(config: LlamaConfig, weights: Weights, path: Path, out: Path, shards: int) -> str:
    places = [path, path.parent] if meta.is_meta(path) else [path]  # Meta's own downloads have it beside the folders
    tokenizer = next((p for p in (place / "tokenizer.model" for place in places) if p.is_file()), None)
    meta.params_of(config)  # what cannot be said is refused before anything is written
    with new_folder(out, "model") as folder:
        meta.write(config, weights, folder, tokenizer, shards)
        load_tokenizer(path).save(folder)  # Meta's code wants a tokenizer.model, which has no template and never grew
        ids = {"bos_token_id": config.bos_token_id, meta.CONTEXT: config.max_position_embeddings, **generation_of(path)}
        (folder / meta.GENERATION).write_text(json.dumps(ids) + "\n", encoding="utf-8")
        manifest = write_manifest(folder, "model", [path], parameters=config.num_parameters())
    return str(manifest["files"]["consolidated.00.pth"])


def size_of(path: Path) -> int:
    """Bytes of a file (with those that a model was split into), or of the files in a folder."""
    files = parts(path) if path.is_file() else list(path.iterdir())
    return sum(p.stat().st_size for p in files if p.is_file())
