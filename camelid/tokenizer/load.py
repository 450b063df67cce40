"""Open a tokenizer: a Hugging Face folder, a SentencePiece or tiktoken `tokenizer.model`, or a GGUF file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from camelid.errors import FormatError, InputError
from camelid.tokenizer import byte_level, tiktoken_ranks
from camelid.tokenizer import sentencepiece_model as spm
from camelid.tokenizer.patterns import LLAMA3, QWEN2
from camelid.tokenizer.template import LLAMA3 as LLAMA3_TEMPLATE
from camelid.tokenizer.tokenizer import Tokenizer


def from_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder. Raises InputError when it has none, FormatError when it is damaged."""
    config = _read(folder / "tokenizer_config.json")
    template = _template(folder, config)
    if (folder / "tokenizer.json").exists():
        return _from_json(folder / "tokenizer.json", config, template)
    if (folder / "tokenizer.model").exists():
        return from_model_file(folder / "tokenizer.model", config, template)
    raise InputError(f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model")


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} is not a JSON object")
    return value


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    return template if isinstance(template, str) else None


def _named(config: Mapping[str, Any], key: str) -> str:
    """A special token's text; "" where none is set (the tutorial's checkpoint writes empty strings)."""
    value = config.get(key) or ""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value)


def _from_json(path: Path, config: Mapping[str, Any], template: str | None) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(path.read_text(encoding="utf-8"))
    # The library raises plain Exception, and its panics are BaseException, for every fault in the file.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise FormatError(f"{path} is not a tokenizer, or is damaged ({error})") from None
    _check_ids(path, backend.get_vocab(with_added_tokens=True))
    backend.no_truncation()  # a file may ask for it; a text would lose its end without a word
    backend.no_padding()
    ids = {key: backend.token_to_id(_named(config, f"{key}_token")) for key in ("bos", "eos", "pad")}
    return Tokenizer(
        backend, bos_token_id=ids["bos"], eos_token_id=ids["eos"], pad_token_id=ids["pad"], chat_template=template
    )


def _check_ids(path: Path, vocab: Mapping[str, int]) -> None:
    """Every id from 0 on stands for one token: else some row of an embedding is never used, or used twice."""
    numbers = sorted(vocab.values())
    for expected, number in enumerate(numbers):
        if number != expected:
            fault = f"id {number} stands for two tokens" if number < expected else f"no token has id {expected}"
            raise FormatError(f"{path}: {fault}, of {len(numbers)} tokens")


def from_model_file(path: Path, config: Mapping[str, Any] | None = None, template: str | None = None) -> Tokenizer:
    """A `tokenizer.model`, which is one of two quite different files. Raises FormatError when it is neither."""
    if tiktoken_ranks.looks_like_ranks(path):
        return from_tiktoken(path, template)
    return from_sentencepiece(path, config, template)


def from_tiktoken(path: Path, template: str | None = None) -> Tokenizer:
    """Llama 3's `tokenizer.model`, with its control tokens and (unless given another) its chat layout."""
    ranks, specials = tiktoken_ranks.read(path), tiktoken_ranks.special_tokens()
    backend = byte_level.from_ranks(ranks, specials)
    ids = {name: i for i, name in enumerate(specials, len(ranks))}
    spm.add_bos(backend, "<|begin_of_text|>", ids["<|begin_of_text|>"])
    return Tokenizer(
        backend,
        bos_token_id=ids["<|begin_of_text|>"],
        eos_token_id=ids["<|end_of_text|>"],
        pad_token_id=ids["<|finetune_right_pad_id|>"],
        chat_template=template or LLAMA3_TEMPLATE,
    )


def from_sentencepiece(path: Path, config: Mapping[str, Any] | None = None, template: str | None = None) -> Tokenizer:
    """A `tokenizer.model` file, BOS in front unless the config's `add_bos_token` is false."""
    model, config = spm.read(path), config or {}
    ids = {piece.text: i for i, piece in enumerate(model.pieces)}
    bos, eos = ids.get(_named(config, "bos_token") or "<s>"), ids.get(_named(config, "eos_token") or "</s>")
    add_bos = bos if config.get("add_bos_token", True) else None
    backend = spm.build(model.pieces, add_dummy_prefix=model.add_dummy_prefix, bos=add_bos)
    return Tokenizer(backend, bos_token_id=bos, eos_token_id=eos, chat_template=template)


def from_gguf(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer inside a GGUF file's metadata: kinds `llama` (SentencePiece) and `gpt2` (byte-level)."""
    kind = metadata.get("tokenizer.ggml.model")
    words, kinds = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(words, list) or not isinstance(kinds, list) or len(words) != len(kinds):
        raise FormatError(f"{path}: tokenizer.ggml.tokens and token_type are missing or differ in length")
    ids = {key: _id(path, metadata, key, len(words)) for key in ("bos", "eos", "padding")}
    add_bos = ids["bos"] if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") else None
    if kind == "llama":
        scores = metadata.get("tokenizer.ggml.scores")
        if not isinstance(scores, list) or len(scores) != len(words):
            raise FormatError(f"{path}: tokenizer.ggml.scores is missing or has the wrong length")
        pieces = [spm.Piece(*row) for row in zip(words, scores, kinds, strict=True)]
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        backend = spm.build(pieces, add_dummy_prefix=prefix, bos=add_bos)
    elif kind == "gpt2":
        backend = _byte_level(path, metadata, words, kinds)
        if add_bos is not None:
            spm.add_bos(backend, words[add_bos], add_bos)
    else:
        raise FormatError(f"{path}: tokenizer.ggml.model is {kind!r}; camelid reads 'llama' and 'gpt2'")
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["padding"],
        chat_template=template if isinstance(template, str) else None,
    )


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
        "llama-bpe": [Split(Regex(LLAMA3), "isolated"), plain],
        "qwen2": [Split(Regex(QWEN2), "isolated"), plain],
        "smollm": [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)],
        "gpt-2": [ByteLevel(add_prefix_space=False)],
    }
    if name not in known:
        raise FormatError(f"{path}: tokenizer.ggml.pre is {name!r}; camelid knows {', '.join(known)}")
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise FormatError(f"{path}: tokenizer.ggml.merges is missing")
    pairs = [tuple(str(merge).split(" ", 1)) for merge in merges]
    vocab = {word: i for i, word in enumerate(words)}
    if len(vocab) != len(words):
        raise FormatError(f"{path}: tokenizer.ggml.tokens holds a token twice")
    for pair in pairs:
        if len(pair) != 2 or any(part not in vocab for part in (*pair, "".join(pair))):
            raise FormatError(f"{path}: the merge {' '.join(pair)!r} uses a token that is not in the vocabulary")
    backend = Backend(models.BPE(vocab, pairs, ignore_merges=name == "llama-bpe"))  # type: ignore[arg-type]
    backend.pre_tokenizer = Sequence(known[name])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(w, normalized=False, special=True) for w, k in zip(words, kinds, strict=True) if k == spm.CONTROL]
    )
    user = [AddedToken(w, normalized=False) for w, k in zip(words, kinds, strict=True) if k == spm.USER_DEFINED]
    backend.add_tokens(user)
    return backend
