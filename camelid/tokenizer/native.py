"""The native path for the pipelines that LLaMA models have; any other tokenizer stays with the `tokenizers` library.

`pipeline_of` reads a tokenizer.json's description and answers None unless it knows every part of it, so that a
tokenizer with something unusual is never encoded in a usual way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camelid.kernels import bpe
from camelid.tokenizer.patterns import GPT2, LLAMA3, QWEN2, byte_to_character

LIMIT = 0x34000
"""No letter, number or blank lies beyond."""
BLANK = "▁"


@cache
def classes() -> NDArray[np.uint8]:
    """Letter 1, number 2, blank 4, digit to be cut off 8, for every code point below LIMIT, as the `tokenizers`
    library sees them."""
    table = np.zeros(LIMIT, dtype=np.uint8)
    lines = (Path(__file__).parent / "unicode.txt").read_text(encoding="ascii").splitlines()
    for bit, line in zip((1, 2, 4, 8), lines, strict=True):
        for part in line.split():
            first, _, last = part.partition("-")
            table[int(first, 16) : int(last or first, 16) + 1] |= bit
    return table


@dataclass(frozen=True)
class Pipeline:
    """How text is cut (a constant of kernels/bpe.py), and whether a blank is put in front."""

    kind: int
    prefix_blank: bool = False


def native_bpe(description: Mapping[str, Any]) -> bpe.NativeBpe | None:
    """The native encoder of a tokenizer.json's content; None when it, or the library, is not there for it."""
    model = description["model"]
    pipeline = pipeline_of(description)
    vocab: dict[str, int] = model["vocab"]
    if pipeline is None or not vocab or not bpe.ready(classes):
        return None
    as_bytes = str.encode if pipeline.kind == bpe.WHOLE else bytes_of
    byte_ids = _byte_ids(model, pipeline.kind)
    if byte_ids is None:
        return None
    tokens = [b""] * (max(vocab.values()) + 1)
    for text, number in vocab.items():
        tokens[number] = as_bytes(text)
    if pipeline.kind == bpe.WHOLE and any("<0x" in "".join(merge) for merge in model["merges"]):
        return None  # bytes that are merged: text could not be cut between characters
    rows = [
        (vocab[left], vocab[right], vocab[left + right])
        for left, right in (m if isinstance(m, list) else m.split(" ") for m in model["merges"])
    ]
    merges = np.array(rows, dtype=np.uint32).reshape(-1, 3)
    ignore_merges = bool(model.get("ignore_merges"))
    return bpe.NativeBpe(tokens, merges, byte_ids, pipeline.kind, ignore_merges, pipeline.prefix_blank)


def pipeline_of(description: Mapping[str, Any]) -> Pipeline | None:
    """What a tokenizer.json does to text before merging, when it is one of the known ways."""
    model = description["model"]
    plain = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model.get("type") != "BPE" or any(model.get(key) for key in plain):
        return None
    normalizer, cutter = description.get("normalizer"), description.get("pre_tokenizer")
    if model.get("byte_fallback"):
        if model.get("ignore_merges"):  # would look the whole text up
            return None
        return _sentencepiece(normalizer, cutter)
    return None if normalizer else _byte_level(cutter)


def _sentencepiece(normalizer: Any, cutter: Any) -> Pipeline | None:
    """LLaMA 1 and 2: blanks become ▁, one is put in front, nothing is cut."""
    if normalizer is None and cutter and cutter.get("type") == "Metaspace" and not cutter.get("split", True):
        scheme = cutter.get("prepend_scheme")
        known = cutter.get("replacement") == BLANK and scheme == "never"  # "first" and "always" look at what is there
        return Pipeline(bpe.WHOLE) if known else None
    if cutter is not None or normalizer is None:
        return None
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    prefix = bool(steps) and steps[0] == {"type": "Prepend", "prepend": BLANK}
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    return Pipeline(bpe.WHOLE, prefix) if steps[prefix:] == [blanks] else None


def _byte_level(cutter: Any) -> Pipeline | None:
    if not cutter:
        return None
    steps = cutter["pretokenizers"] if cutter["type"] == "Sequence" else [cutter]
    *before, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    own_pattern = last.get("use_regex", True)
    if not before:
        return Pipeline(bpe.GPT2) if own_pattern else None
    if len(before) > 1:
        return None
    first = before[0]
    if first == {"type": "Digits", "individual_digits": True}:
        return Pipeline(bpe.DIGITS_GPT2) if own_pattern else None
    if own_pattern or first["type"] != "Split" or first["behavior"] != "Isolated" or first.get("invert"):
        return None
    kinds = {LLAMA3: bpe.LLAMA3, QWEN2: bpe.LLAMA3_DIGITS, GPT2: bpe.GPT2}
    kind = kinds.get(first["pattern"].get("Regex", ""))
    return None if kind is None else Pipeline(kind)


def bytes_of(token: str) -> bytes:
    """The bytes of a byte-level token; b"" for a token that is not written in that alphabet."""
    table = character_to_byte()
    return bytes(table[c] for c in token) if all(c in table for c in token) else b""


@cache
def character_to_byte() -> dict[str, int]:
    """Byte of each character of the byte-level alphabet."""
    return {c: b for b, c in enumerate(byte_to_character())}


def _byte_ids(model: Mapping[str, Any], kind: int) -> NDArray[np.uint32] | None:
    """The ids of the 256 bytes; all ones for a byte that has none and is left out. None when that is not what the
    library would do."""
    vocab: dict[str, int] = model["vocab"]
    names = [f"<0x{b:02X}>" for b in range(256)] if kind == bpe.WHOLE else byte_to_character()
    missing = any(name not in vocab for name in names)
    if (kind == bpe.WHOLE and (missing or BLANK not in vocab)) or (missing and model.get("unk_token")):
        return None
    return np.array([vocab.get(name, 0xFFFFFFFF) for name in names], dtype=np.uint32)
