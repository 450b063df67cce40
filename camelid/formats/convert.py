"""Any MODEL as a folder that stands alone, Hugging Face's or Meta's, or as one GGUF file: weights and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from camelid.artifact import new_folder, write_manifest
from camelid.errors import InputError
from camelid.formats import gguf_write, meta
from camelid.formats.adapter import is_adapter
from camelid.formats.hf import write_weights
from camelid.formats.load import load, load_tokenizer, open_model, resolve, stop_ids
from camelid.model.llama import Llama
from camelid.model.quantized import make_dense


def write_model(model: Llama, source: Path, out: str | Path, inputs: list[Path], **facts: Any) -> str:
    """Write `out`: the weights of `model`, with the tokenizer and the stop ids of `source`. Returns the SHA-256 of its
    first weights file."""
    generation = {"eos_token_id": list(stop_ids(source))}
    with new_folder(Path(out)) as folder:
        known = write_weights(model.config, dict(model.named_parameters()), folder, generation)
        load_tokenizer(source).save(folder)
        write_manifest(folder, "model", inputs, known=known, parameters=model.num_parameters(), **facts)
    return next(iter(known.values()))


def convert(source: str | Path, out: str | Path, to: str = "hf", shards: int = 1, kind: str = "F16") -> dict[str, Any]:
    """Write any MODEL as a Hugging Face folder (`hf`) or as one of Meta's (`meta`, in `shards` files), in the file's
    dtype (quantised ones: float32), or as a GGUF file (`gguf`) with matrices of `kind`."""
    path = resolve(source)
    if path.is_dir() and is_adapter(path):
        raise InputError(f"{path} is an adapter: camelid merge puts it into its base")
    if shards != 1 and to != "meta":
        raise InputError(f"--shards {shards} is for --to meta")
    # What was rounded is written as it is meant, in full.
    model: Llama = load(path, dtype=torch.float32 if open_model(path).quantized else None)
    make_dense(model)
    if to == "gguf":
        digest = gguf_write.write(model, load_tokenizer(path), Path(out), kind, stop_ids(path))
    else:
        digest = _write_meta(model, path, Path(out), shards) if to == "meta" else write_model(model, path, out, [path])
    return {
        "out": str(out),
        "before": {"bytes": size_of(path)},
        "after": {"bytes": size_of(Path(out))},
        "digest": digest,
    }


def _write_meta(model: Llama, path: Path, out: Path, shards: int) -> str:
    tokenizer = next((p for p in (path / "tokenizer.model", path.parent / "tokenizer.model") if p.is_file()), None)
    meta.params_of(model.config)  # what cannot be said is refused before anything is written
    with new_folder(out) as folder:
        meta.write(model, folder, tokenizer, shards)
        if tokenizer is None:  # Meta's code wants a tokenizer.model; ours opens this one
            load_tokenizer(path).save(folder)
        manifest = write_manifest(folder, "model", [path], parameters=model.num_parameters())
    return str(manifest["files"]["consolidated.00.pth"])


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    files = [path] if path.is_file() else [p for p in path.iterdir() if p.is_file()]
    return sum(p.stat().st_size for p in files)
