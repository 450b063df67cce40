"""A tokenizer in GGUF's fields (ggml's docs/gguf.md, `tokenizer.ggml.*`), both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from camelid.errors import FormatError, InputError
from camelid.tokenizer import sentencepiece_model as spm
from camelid.tokenizer.patterns import LLAMA3, QWEN2
from camelid.tokenizer.tokenizer import Tokenizer

LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
# What ends a text, a turn or a message to a tool, whatever a file names or takes it for (llama.cpp, llama-vocab.cpp).
ENDS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>", "<EOT>",
    "_<EOT>",
))  # fmt: skip


def from_gguf(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer inside a GGUF file's metadata: kinds `llama` (SentencePiece) and `gpt2` (byte-level)."""
    kind = metadata.get("tokenizer.ggml.model")
    words = _list(path, metadata, "tokens", str)
    kinds = _list(path, metadata, "token_type", int, len(words))
    kinds = [spm.CONTROL if word in ENDS else kind for word, kind in zip(words, kinds, strict=True)]
    ids = {key: _id(path, metadata, key, len(words)) for key in ("bos", "eos", "padding")}
    usual = kind == "llama" or metadata.get("tokenizer.ggml.pre") in LLAMA3_NAMES  # as llama.cpp, when nothing is said
    if kind == "llama":
        scores = _list(path, metadata, "scores", float, len(words))
        pieces = [spm.Piece(*row) for row in zip(words, scores, kinds, strict=True)]
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        backend = spm.build(pieces, add_dummy_prefix=prefix)
    elif kind == "gpt2":
        backend = _byte_level(path, metadata, words, kinds)
    else:
        raise FormatError(f"{path}: tokenizer.ggml.model is {kind!r}; camelid reads 'llama' and 'gpt2'")

    def end(key: str, usually: bool) -> tuple[str, int] | None:
        i = ids[key]
        return (words[i], i) if i is not None and metadata.get(f"tokenizer.ggml.add_{key}_token", usually) else None

    spm.add_ends(backend, end("bos", usual), end("eos", False))
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["padding"],
        chat_template=template if isinstance(template, str) else None,
    )


def _list(path: Path, metadata: Mapping[str, Any], key: str, kind: type, size: int | None = None) -> list[Any]:
    found = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(found, list) or not all(isinstance(one, kind) for one in found):
        raise FormatError(f"{path}: tokenizer.ggml.{key} is missing, or not all of it is {kind.__name__}")
    if size is not None and len(found) != size:
        raise FormatError(f"{path}: tokenizer.ggml.{key} has {len(found)} entries, tokenizer.ggml.tokens {size}")
    return found


def _id(path: Path, metadata: Mapping[str, Any], key: str, size: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if value is not None and (not isinstance(value, int) or not 0 <= value < size):
        raise FormatError(f"{path}: tokenizer.ggml.{key}_token_id is {value!r}, outside the vocabulary of {size}")
    return value


def _byte_level(path: Path, metadata: Mapping[str, Any], words: list[str], kinds: list[int]) -> Any:
    from tokenizers import AddedToken, Regex, decoders, models
    from tokenizers import Tokenizer as Backend
    from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

    name = metadata.get("tokenizer.ggml.pre", "default")
    plain = ByteLevel(add_prefix_space=False, use_regex=False)
    known: dict[str, list[PreTokenizer]] = {
        **{name: [Split(Regex(LLAMA3), "isolated"), plain] for name in LLAMA3_NAMES},
        "qwen2": [Split(Regex(QWEN2), "isolated"), plain],
        "smollm": [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)],
        "gpt-2": [ByteLevel(add_prefix_space=False)],
    }
    if not isinstance(name, str) or name not in known:
        raise FormatError(f"{path}: tokenizer.ggml.pre is {name!r}; camelid knows {', '.join(known)}")
    pairs = [tuple(merge.split(" ", 1)) for merge in _list(path, metadata, "merges", str)]
    vocab = {word: i for i, word in enumerate(words)}
    if len(vocab) != len(words):
        raise FormatError(f"{path}: tokenizer.ggml.tokens holds a token twice")
    for pair in pairs:
        if len(pair) != 2 or any(part not in vocab for part in (*pair, "".join(pair))):
            raise FormatError(f"{path}: the merge {' '.join(pair)!r} uses a token that is not in the vocabulary")
    backend = Backend(models.BPE(vocab, pairs, ignore_merges=name in LLAMA3_NAMES))
    backend.pre_tokenizer = Sequence(known[name])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(w, normalized=False, special=True) for w, k in zip(words, kinds, strict=True) if k == spm.CONTROL]
    )
    user = [AddedToken(w, normalized=False) for w, k in zip(words, kinds, strict=True) if k == spm.USER_DEFINED]
    backend.add_tokens(user)
    return backend


def tokenizer_metadata(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """A tokenizer in GGUF's fields, filled up to the embedding's `rows`. Raises InputError for one that cuts text in a
    way GGUF has no name for: another program would then see other tokens."""
    description = json.loads(tokenizer.backend.to_str())
    model, added = description["model"], {t["id"]: t for t in description["added_tokens"]}
    if model["type"] != "BPE":
        raise InputError(f"GGUF's readers here know no tokenizer of kind {model['type']}: convert to hf instead")
    sentencepiece = bool(model.get("byte_fallback"))
    vocabulary = {i: word for word, i in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    words = [vocabulary.get(i, f"[PAD{i}]") for i in range(rows)]
    kinds = [_piece_kind(i, word, vocabulary, added, model, sentencepiece) for i, word in enumerate(words)]
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if sentencepiece else "gpt2",
        "tokenizer.ggml.tokens": words, "tokenizer.ggml.token_type": kinds,
    }  # fmt: skip
    around = tokenizer.encode("")
    begins = around[:1] == [tokenizer.bos_token_id]
    if (rest := around[begins:]) not in ([], [tokenizer.eos_token_id]):
        raise InputError(f"GGUF cannot say that the tokens {around} stand around every text: convert to hf instead")
    found |= {"tokenizer.ggml.add_bos_token": begins, "tokenizer.ggml.add_eos_token": bool(rest)}
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    if sentencepiece:
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        found["tokenizer.ggml.scores"] = [-float(ranks.get(word, len(merges))) for word in words]
        found["tokenizer.ggml.add_space_prefix"] = _prefixed(description["normalizer"], description["pre_tokenizer"])
    else:
        found["tokenizer.ggml.pre"] = cutting = _cutting(description["pre_tokenizer"])
        normalizer = description["normalizer"] or {"type": "Sequence", "normalizers": []}
        steps = [step["type"] for step in normalizer.get("normalizers", [normalizer])]
        if steps and (cutting, steps) != ("qwen2", ["NFC"]):  # which every qwen2 has, and no reader of GGUF applies
            told = ", ".join(steps)
            raise InputError(f"GGUF has no name for this tokenizer's normalizer ({told}): convert to hf instead")
        found["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges]
    for key in ("bos", "eos", "pad"):
        if (token := getattr(tokenizer, f"{key}_token_id")) is not None:
            found[f"tokenizer.ggml.{'padding' if key == 'pad' else key}_token_id"] = token
    if tokenizer.chat_template:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def _piece_kind(
    i: int,
    word: str,
    vocabulary: Mapping[int, str],
    added: Mapping[int, Any],
    model: Mapping[str, Any],
    bytes_too: bool,
) -> int:
    if i not in vocabulary:
        return spm.UNUSED
    if word == model.get("unk_token"):
        return spm.UNKNOWN
    if i in added:
        return spm.CONTROL if added[i]["special"] else spm.USER_DEFINED
    return spm.BYTE if bytes_too and len(word) == 6 and word.startswith("<0x") else spm.NORMAL


def _prefixed(normalizer: Mapping[str, Any] | None, cutter: Mapping[str, Any] | None) -> bool:
    """Whether a SentencePiece tokenizer puts a blank before a text. Transformers writes one of three forms: a
    normalizer that prepends and replaces, a Metaspace cutter, or (Gemma) a normalizer that replaces and a cut at
    blanks, of which none are left. Metaspace adds no blank to a text that begins with one, nor, as
    `first`, after a control token; every reader of GGUF does, as SentencePiece itself."""
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    kinds = [step["type"] for step in steps]
    plain = all(step["content"] == spm.SPACE for step in steps if step["type"] == "Replace")
    cut = (cutter or {}).get("type")
    if plain and kinds in (["Prepend", "Replace"], ["Replace"]) and cut in (None, "Split"):
        return "Prepend" in kinds
    if not kinds and cutter and cut == "Metaspace" and not cutter.get("split", True):
        return bool(cutter["prepend_scheme"] != "never")
    raise InputError("GGUF has no name for how this tokenizer treats blanks: convert to hf instead")


def _cutting(cutter: Mapping[str, Any] | None) -> str:
    """What GGUF calls a byte-level tokenizer's way of cutting text into words."""
    steps = (cutter or {}).get("pretokenizers", [cutter] if cutter else [])
    known = all(
        s["type"] == "Split" or (s["type"] == "Digits" and s["individual_digits"])
        or (s["type"] == "ByteLevel" and not s["add_prefix_space"])
        for s in steps
    )  # fmt: skip
    patterns = [s["pattern"].get("Regex") for s in steps if s["type"] == "Split"]
    digits = any(s["type"] == "Digits" and s["individual_digits"] for s in steps)
    whole = any(s["type"] == "ByteLevel" and s["use_regex"] for s in steps)
    if known and patterns == [LLAMA3] and not digits:
        return "llama-bpe"
    if known and patterns == [QWEN2] and not digits:
        return "qwen2"
    if known and not patterns and whole:
        return "smollm" if digits else "gpt-2"
    raise InputError("GGUF has no name for how this tokenizer cuts text into words: convert to hf instead")
