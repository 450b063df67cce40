"""Open a tokenizer: a Hugging Face folder, a SentencePiece or tiktoken `tokenizer.model`."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camelid.disk import read_json
from camelid.errors import FormatError, InputError
from camelid.tokenizer import byte_level, tiktoken_ranks
from camelid.tokenizer import sentencepiece_model as spm
from camelid.tokenizer.template import LLAMA3 as LLAMA3_TEMPLATE
from camelid.tokenizer.tokenizer import Tokenizer

LLAMAS = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


def from_folder(folder: Path, rows: float | None = None) -> Tokenizer:
    """The tokenizer of a model folder, whose embedding has `rows` (by default as many as its config.json says). Raises
    InputError when it has none, FormatError when it is damaged."""
    config = _config(folder)
    template = _template(folder, config)
    if (folder / "tokenizer.json").exists():
        found = _from_json(folder / "tokenizer.json", config, template, rows or _rows(folder))
        beside = folder / "tokenizer.model"
        if beside.is_file() and not tiktoken_ranks.looks_like_ranks(beside):
            with suppress(FormatError):  # of another kind: nothing to keep
                spm.read(beside)
                found.model_file = beside.read_bytes()
        return found
    if (folder / "tokenizer.model").exists():
        return from_model_file(folder / "tokenizer.model", config, template, rows)
    raise InputError(f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model")


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, and what older files beside it say (as transformers reads them): the ends in
    special_tokens_map.json, the tokens that were added to a `tokenizer.model` in added_tokens.json."""
    config = _read(folder / "tokenizer_config.json")
    if not config.get("added_tokens_decoder"):
        named = _read(folder / "special_tokens_map.json")
        config |= {key: value for key, value in named.items() if not config.get(key)}
        names = {_named(config, f"{key}_token") for key in ("bos", "eos", "pad", "unk")}
        names |= {str(t.get("content") if isinstance(t, dict) else t)
                  for t in config.get("additional_special_tokens") or []}  # fmt: skip
        config["added_tokens_decoder"] = {
            str(i): {"content": name, "special": name in names}
            for name, i in _read(folder / "added_tokens.json").items()
        }
    return config


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{path} is not UTF-8: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {one["name"]: one.get("template") for one in template if isinstance(one, dict) and "name" in one}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _named(config: Mapping[str, Any], key: str) -> str:
    """A special token's text; "" where none is set (the tutorial's checkpoint writes empty strings)."""
    value = config.get(key) or ""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value)


def _from_json(path: Path, config: Mapping[str, Any], template: str | None, rows: float) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        text = path.read_text(encoding="utf-8")
        backend = Backend.from_str(text)
        if any(number >= rows for number in backend.get_added_tokens_decoder()):
            backend = Backend.from_str(_without_rowless(text, rows, config, template))
    # The library raises plain Exception, and its panics are BaseException, for every fault in the file.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise FormatError(f"{path} is not a tokenizer, or is damaged ({error})") from None
    _check_ids(path, backend.get_vocab(with_added_tokens=True))
    backend.no_truncation()  # a file may ask for it; a text would lose its end without a word
    backend.no_padding()
    ids = {key: backend.token_to_id(_named(config, f"{key}_token")) for key in ("bos", "eos", "pad")}
    if config.get("tokenizer_class") in LLAMAS:
        _heed_ends(path, backend, config, ids)
    return Tokenizer(
        backend, bos_token_id=ids["bos"], eos_token_id=ids["eos"], pad_token_id=ids["pad"], chat_template=template
    )


def _heed_ends(path: Path, backend: Backend, config: Mapping[str, Any], ids: Mapping[str, int | None]) -> None:
    """What the config says of an end of a text counts before what the file does, as in transformers 4; 5 looks at the
    file only. Where the two differ it is said; where the config is silent the file is as it is."""
    around = backend.encode("").ids
    first = around[:1] == [ids["bos"]]
    lies = {"bos": first, "eos": around[first:] == [ids["eos"]]}  # the two may be one token
    ends: dict[str, tuple[str, int] | None] = {}
    changed = []
    for key in ("bos", "eos"):
        number, word = ids[key], config.get(f"add_{key}_token")
        there = lies[key]
        wanted = word if isinstance(word, bool) and number is not None else there
        ends[key] = (_named(config, f"{key}_token"), number) if wanted and number is not None else None
        changed += [f"add_{key}_token {str(wanted).lower()}"] if wanted != there else []
    if changed:
        spm.set_ends(backend, ends["bos"], ends["eos"])
        print(
            f"camelid: {path.parent}: tokenizer_config.json says {' and '.join(changed)}, tokenizer.json does "
            "otherwise: the first counts, as in transformers 4; transformers 5 goes by the second",
            file=sys.stderr,
        )


def _rows(folder: Path) -> float:
    """How many rows the embedding of the model in a folder has, if there is one."""
    rows = _read(folder / "config.json").get("vocab_size")
    return rows if isinstance(rows, int) else math.inf


def _without_rowless(text: str, rows: float, config: Mapping[str, Any], template: str | None) -> str:
    """A tokenizer.json without the added tokens that the embedding has no row for, as a pad token that came later. All
    of it where one of them begins or ends texts, or is the chat template's: it does not belong to the model, which is
    found out."""
    described = json.loads(text)
    late = [token["content"] for token in described["added_tokens"] if token["id"] >= rows]
    needed = f"{_named(config, 'bos_token')} {_named(config, 'eos_token')} {template or ''}"
    if any(name in needed for name in late):
        return text
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < rows]
    return json.dumps(described, ensure_ascii=False)


def _check_ids(path: Path, vocab: Mapping[str, int]) -> None:
    """Every id from 0 on stands for one token: else some row of an embedding is never used, or used twice."""
    numbers = sorted(vocab.values())
    for expected, number in enumerate(numbers):
        if number != expected:
            fault = f"id {number} stands for two tokens" if number < expected else f"no token has id {expected}"
            raise FormatError(f"{path}: {fault}, of {len(numbers)} tokens")


def from_model_file(
    path: Path, config: Mapping[str, Any] | None = None, template: str | None = None, rows: float | None = None
) -> Tokenizer:
    """A `tokenizer.model`, which is one of two quite different files. Raises FormatError when it is neither."""
    if tiktoken_ranks.looks_like_ranks(path):
        return from_tiktoken(path, config, template)
    return from_sentencepiece(path, config, template, rows)


def from_tiktoken(path: Path, config: Mapping[str, Any] | None = None, template: str | None = None) -> Tokenizer:
    """Llama 3's `tokenizer.model`, with its control tokens and (unless the config or `template` say otherwise) its ends
    and chat layout."""
    ranks, specials = tiktoken_ranks.read(path), tiktoken_ranks.special_tokens()
    backend = byte_level.from_ranks(ranks, specials)
    usual = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "pad": "<|finetune_right_pad_id|>"}
    ids = {name: i for i, name in enumerate(specials, len(ranks))}
    return _told(backend, ids, usual, config or {}, template or LLAMA3_TEMPLATE)


def from_sentencepiece(
    path: Path, config: Mapping[str, Any] | None = None, template: str | None = None, rows: float | None = None
) -> Tokenizer:
    """A `tokenizer.model` file, BOS in front unless the config's `add_bos_token` is false."""
    model, config = spm.read(path), config or {}
    named: Mapping[str, Any] = config.get("added_tokens_decoder") or {}
    if not isinstance(named, dict):
        raise FormatError(f"{path.parent}: its added tokens cannot be read: added_tokens_decoder is {named!r:.40}")
    pieces = _renamed(model.pieces, named)
    _tell_equals(path, pieces)
    backend = spm.build(pieces, add_dummy_prefix=model.add_dummy_prefix and config.get("add_prefix_space") is not False)
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    ids |= _add(path, backend, named, rows or _rows(path.parent))
    found = _told(backend, ids, {"bos": "<s>", "eos": "</s>"}, config, template)
    if config.get("add_prefix_space") is not False:  # else it no longer says how text is cut
        found.model_file = path.read_bytes()
    return found


def _renamed(pieces: Sequence[spm.Piece], named: Mapping[str, Any]) -> list[spm.Piece]:
    """The pieces under the names that the config gives them, as it does to those that a vocabulary keeps free. A name
    that another piece has stays that one's."""
    found = list(pieces)
    texts = {piece.text for piece in pieces}
    for key, token in named.items():
        text = token.get("content") if isinstance(token, dict) else None
        place = int(key) if key.isdecimal() and len(key) < 10 else len(found)
        if place < len(found) and isinstance(text, str) and text not in texts:
            kind = spm.CONTROL if token.get("special") else spm.USER_DEFINED
            found[place] = spm.Piece(text, found[place].score, kind)
    return found


def _tell_equals(path: Path, pieces: Sequence[spm.Piece]) -> None:
    """Say where a list of merges, which has a rank for each, cannot say what the file does: a vocabulary that was
    merged from two (Chinese-LLaMA's) gives all its new pieces one score. Runs of blanks come out alike."""
    merged = (p.score for p in pieces if p.kind == spm.NORMAL and len(p.text) > 1 and p.text.strip(spm.SPACE))
    equal = sum(n for n in Counter(merged).values() if n > 1)
    if equal:
        print(
            f"camelid: {path}: {equal:,} pieces share a score with another: sentencepiece merges the leftmost of them "
            "first, and here, as in transformers, the one of the lower id: some texts are cut differently",
            file=sys.stderr,
        )


def _add(path: Path, backend: Backend, wanted: Mapping[str, Any], end: float) -> dict[str, int]:
    """Give the tokens that stand behind a model's own pieces their places, but for those that its embedding has no row
    for. Raises FormatError where a place would be left empty: some row would have another token's id."""
    from tokenizers import AddedToken

    size = backend.get_vocab_size(with_added_tokens=True)
    try:
        behind = sorted((int(i), token) for i, token in wanted.items() if size <= int(i) < end)
        tokens = [
            AddedToken(
                token["content"], special=bool(token.get("special")), lstrip=bool(token.get("lstrip")),
                rstrip=bool(token.get("rstrip")), single_word=bool(token.get("single_word")), normalized=False,
            )
            for _, token in behind
        ]  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FormatError(f"{path.parent}: its added tokens cannot be read ({error!r})") from None
    for expected, ((number, _), token) in enumerate(zip(behind, tokens, strict=True), size):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if number != expected or backend.token_to_id(token.content) != number:
            raise FormatError(f"{path.parent}: the added token {token.content!r} has id {number}, not {expected}")
    return {token.content: number for (number, _), token in zip(behind, tokens, strict=True)}


def _told(
    backend: Backend, ids: Mapping[str, int], usual: Mapping[str, str], config: Mapping[str, Any], template: str | None
) -> Tokenizer:
    """A tokenizer of a `tokenizer.model`: its control tokens are those that the config names, else the usual ones."""
    names = {key: _named(config, f"{key}_token") or usual.get(key, "") for key in ("bos", "eos", "pad")}
    bos, eos, pad = (ids.get(name) for name in names.values())
    first = (names["bos"], bos) if bos is not None and config.get("add_bos_token", True) else None
    spm.add_ends(backend, first, (names["eos"], eos) if eos is not None and config.get("add_eos_token") else None)
    return Tokenizer(backend, bos_token_id=bos, eos_token_id=eos, pad_token_id=pad, chat_template=template)
