"""Write a tokens folder: every document as BOS + ids + EOS in one memory-mapped file, and where each begins."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camelid.artifact import new_folder, write_manifest
from camelid.disk import write_array
from camelid.errors import InputError
from camelid.tokenizer.tokenizer import Tokenizer

TOKENS, STARTS, INDEX = "tokens.bin", "documents.npy", "index.json"


def build(texts: Iterable[str], tokenizer: Tokenizer, out: str | Path, inputs: list[Path]) -> dict[str, Any]:
    """Make the tokens folder `out`. Text is never parsed for control tokens. Returns documents, tokens, digest, out."""
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token: documents could not be told apart")
    width = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    starts = [0]
    with new_folder(Path(out), "tokens") as folder:
        with (folder / TOKENS).open("wb") as file:
            for ids, lengths in _framed(texts, tokenizer):
                file.write(ids.astype(width).data)
                starts += (starts[-1] + np.cumsum(lengths)).tolist()
        if len(starts) == 1:
            raise InputError("there is no document to tokenize: the corpus is empty")
        write_array(folder / STARTS, np.asarray(starts, dtype=np.int64))
        facts: dict[str, Any] = {
            "documents": len(starts) - 1,
            "tokens": starts[-1],
            "tokenizer_digest": tokenizer.digest(),
        }
        index = {**facts, "dtype": width.str, "vocab_size": len(tokenizer)}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        (folder / "tokenizer").mkdir()
        tokenizer.save(folder / "tokenizer")
        manifest = write_manifest(folder, "tokens", inputs, **facts)
    return {**facts, "digest": manifest["files"][TOKENS], "out": str(out)}


def _framed(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.int64]]]:
    """Groups of documents, each with BOS before and EOS after it, end to end; and the documents' lengths."""
    bos = tokenizer.bos_token_id
    before = 0 if bos is None else 1
    for ids, offsets in tokenizer.encode_stream(texts):
        lengths = np.diff(offsets) + before + 1
        framed = np.full(int(lengths.sum()), tokenizer.eos_token_id, dtype=np.uint32)
        begins = np.cumsum(lengths) - lengths
        if bos is not None:
            framed[begins] = bos
        framed[np.arange(len(ids)) + np.repeat(begins + before - offsets[:-1], np.diff(offsets))] = ids
        yield framed, lengths
