"""Extend a tokenizer, and the model it belongs to, by tokens learned on new text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from camelid.artifact import new_folder, write_manifest
from camelid.errors import InputError
from camelid.formats import hf
from camelid.formats.adapter import is_adapter
from camelid.formats.load import generation_of, is_gguf, load, load_tokenizer, located, open_model, resolve
from camelid.formats.meta import is_meta
from camelid.model.grow import grow_embeddings
from camelid.model.llama import Llama
from camelid.tokenizer import extend as tokenizers
from camelid.tokenizer.load import from_folder

MEASURED = 1000  # documents


def extend(
    source: str | Path, corpus: Path, texts: Callable[[], Iterable[str]], pieces: int, out: str | Path
) -> dict[str, Any]:
    """Write `out`: `source` with up to `pieces` more tokens; a model's new rows are the means of what spelled them.

    Returns added, vocab_size, bytes_per_token (before, after, on the first documents of the corpus) and out.
    """
    source = folder = located(source)
    tokenizer = load_tokenizer(source)
    has_weights = is_gguf(folder) or (folder.is_dir() and _model(folder))
    if has_weights and is_adapter(resolve(source)):
        raise InputError(f"{source} is an adapter: camelid merge puts it into its base, which can grow")
    if has_weights and (label := open_model(source).quantized):
        raise InputError(f"{source} is rounded ({label}): extend the full-precision model, and quantize that")
    kind = "model" if has_weights else "tokenizer"
    with new_folder(Path(out), kind) as target:
        added = tokenizers.extend(tokenizer, texts, pieces, target, folder if folder.is_dir() else None)
        extended = from_folder(target)
        if has_weights:
            model: Llama = load(source)
            grow_embeddings(model, added.first, added.spelled)
            hf.write_weights(model.config, dict(model.named_parameters()), target, generation_of(source))
        first = list(islice(texts(), MEASURED))
        size = sum(len(text.encode()) for text in first)
        rates = [size / max(1, len(t.encode_batch(first)[0])) for t in (tokenizer, extended)]
        facts: dict[str, Any] = {"added": len(added.names), "vocab_size": len(extended), "digest": extended.digest()}
        write_manifest(target, kind, [resolve(source) if has_weights else folder, corpus], {"pieces": pieces}, **facts)
    return {**facts, "bytes_per_token": rates, "out": str(out)}


def _model(folder: Path) -> bool:
    return (
        (folder / "config.json").exists() or (folder / "checkpoints").is_dir() or is_adapter(folder) or is_meta(folder)
    )
