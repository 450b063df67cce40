"""Add tokens learned on new text, in another language say, to a tokenizer; every id it had keeps its meaning.

New tokens hold at least one character beyond ASCII and are merged last, so ASCII text keeps its ids. The
SentencePiece kind first gains the commonest characters that it spelled in bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from camelid.errors import FormatError, InputError
from camelid.kernels import bpe
from camelid.tokenizer import sentencepiece_model as spm
from camelid.tokenizer.load import from_folder, from_sentencepiece
from camelid.tokenizer.native import classes, native_bpe, pipeline_of
from camelid.tokenizer.tokenizer import Tokenizer

MIN_FREQUENCY = 2
CHARACTER_SHARE = 0.5  # of the new tokens may be single characters
SAMPLE = "A line of text,\n  and 1 more"

Texts = Callable[[], Iterable[str]]


@dataclass
class Extension:
    """What is added: `names` in order of id from `first` on, how many of them are single characters that no merge
    makes, the merges, and for each new token the old ids that spelled it."""

    first: int
    names: list[str] = field(default_factory=list)
    characters: int = 0
    merges: list[tuple[str, str]] = field(default_factory=list)
    spelled: list[list[int]] = field(default_factory=list)


def extend(tokenizer: Tokenizer, texts: Texts, pieces: int, out: Path, source: Path | None = None) -> Extension:
    """Write a tokenizer with up to `pieces` more tokens into the folder `out`; returns what was added.

    source: the folder it came from; its SentencePiece `tokenizer.model`, if it has one, is extended as well. The
    texts are read twice. Raises InputError for a pipeline that is not LLaMA's, or without the native library.
    """
    description = json.loads(tokenizer.backend.to_str())
    pipeline = pipeline_of(description)
    if pipeline is None or not bpe.ready(classes):
        why = "its pipeline is not one of LLaMA's" if pipeline is None else "the native library is not there"
        raise InputError(f"the tokenizer cannot be extended: {why} (`camelid info` tells more)")
    if pieces < 1:
        raise InputError(f"--pieces {pieces}: at least one token must be added")
    for token in description["added_tokens"]:  # else the library would number them anew, behind the new tokens
        description["model"]["vocab"].setdefault(token["content"], token["id"])
    added = Extension(first=len(tokenizer))
    whole = pipeline.kind == bpe.WHOLE
    if whole:
        _add_characters(description, texts(), int(pieces * CHARACTER_SHARE), added)
    _learn(description, texts(), pieces - added.characters, whole, added)
    if not added.names:
        raise InputError("no token can be learned: the text holds no repeated characters beyond ASCII")
    model = source / "tokenizer.model" if source else None
    if whole and model is not None and model.exists() and _says_the_same(model, tokenizer):
        data = spm.append(model.read_bytes(), added.names, added.characters)
        (out / "tokenizer.model").write_bytes(data)
        extended = from_sentencepiece(out / "tokenizer.model", _config(tokenizer), tokenizer.chat_template)
        extended.save(out)
    else:
        tokenizer.save(out)
        (out / "tokenizer.model").unlink(missing_ok=True)  # it lacks what was added
        (out / "tokenizer.json").write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
    _check(from_folder(out), tokenizer, added)
    return added


def _says_the_same(model: Path, tokenizer: Tokenizer) -> bool:
    """Is the file this tokenizer's, or has the folder's tokenizer.json gone its own way (a pad token, another end, no
    blank in front)?"""
    pieces = [piece.text for piece in spm.read(model).pieces]
    if pieces != [tokenizer.token(i) for i in range(len(tokenizer))]:
        return False
    again = from_sentencepiece(model, _config(tokenizer))
    return bool(again.encode(SAMPLE) == tokenizer.encode(SAMPLE))


def _check(extended: Tokenizer, tokenizer: Tokenizer, added: Extension) -> None:
    wanted = [tokenizer.token(i) for i in range(len(tokenizer))] + added.names
    if [extended.token(i) for i in range(len(extended))] != wanted:
        raise FormatError("the extended tokenizer numbers its tokens differently: this tokenizer cannot be extended")


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    names = {f"{key}_token": getattr(tokenizer, f"{key}_token_id") for key in ("bos", "eos", "pad")}
    adds_bos = tokenizer.bos_token_id in tokenizer.encode("a")
    return {key: tokenizer.token(i) for key, i in names.items() if i is not None} | {"add_bos_token": adds_bos}


def _add_characters(description: dict[str, Any], texts: Iterable[str], most: int, added: Extension) -> None:
    """The commonest characters that the vocabulary lacks become tokens."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    vocab = description["model"]["vocab"]
    found = sorted((-n, c) for c, n in counts.items() if n >= MIN_FREQUENCY and ord(c) > 0x7F and c not in vocab)
    for _, character in found[:most]:
        vocab[character] = added.first + len(added.names)
        added.names.append(character)
        added.spelled.append([vocab[f"<0x{b:02X}>"] for b in character.encode("utf-8", "replace")])
    added.characters = len(added.names)


def _learn(description: dict[str, Any], texts: Iterable[str], pieces: int, whole: bool, added: Extension) -> None:
    """Merges on top of those the tokenizer has."""
    base = native_bpe(description)
    assert base is not None  # extend looked
    counter = bpe.PieceCounter(bpe.GPT2 if whole else base.kind)
    counter.add(texts)
    model, controls = description["model"], {t["id"]: t["content"] for t in description["added_tokens"]}
    names: dict[int, str] = {number: name for name, number in model["vocab"].items()} | controls
    fixed = set(controls) | {i for i, name in names.items() if whole and _is_byte(name)}
    tokens = [b"" if i in fixed or i >= len(base.tokens) else base.tokens[i] for i in range(max(names) + 1)]
    rows = counter.learn(base, len(tokens) + pieces, tokens, MIN_FREQUENCY, foreign_only=True)
    spelled = dict(enumerate(added.spelled, added.first))
    paired = not model["merges"] or isinstance(model["merges"][0], list)
    known = {tuple(m) if paired else tuple(m.split(" ")) for m in model["merges"]}
    for left, right, result in rows.tolist():
        merge = names[left], names[right]
        if merge not in known:  # one that is there keeps its rank
            known.add(merge)
            added.merges.append(merge)
            model["merges"].append(list(merge) if paired else " ".join(merge))
        if result not in names:
            names[result] = merge[0] + merge[1]
            spelled[result] = [*spelled.get(left, [left]), *spelled.get(right, [right])]
            added.names.append(names[result])
            added.spelled.append(spelled[result])
            model["vocab"][names[result]] = result


def _is_byte(name: str) -> bool:
    return len(name) == 6 and name.startswith("<0x")
