"""Texts that must have a form: a JSON schema, a regular expression, one of several answers, or a grammar. At each place
only tokens that can still lead there may be chosen (llguidance computes which)."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from camelid.errors import InputError, MissingExtra
from camelid.tokenizer.tokenizer import Tokenizer

GRAMMAR_SIZE, FIRST_FUEL, STEP_FUEL = 200_000, 500_000, 200_000  # what a hostile form may cost: some 10 ms
LONGEST = 1 << 16  # characters of a schema or grammar


@dataclass(frozen=True)
class Form:
    """What a text must be: `kind` and its description, for "choice" a JSON list of strings. Raises InputError for one
    that is too long, or for a schema or list that is none."""

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    text: str

    def __post_init__(self) -> None:
        if len(self.text) > LONGEST:
            raise InputError(f"the {self.kind} has {len(self.text)} characters; {LONGEST} are read")
        if self.kind in ("json_schema", "choice"):
            try:
                value = json.loads(self.text)
            except (ValueError, RecursionError) as error:  # a number of thousands of digits among them
                raise InputError(f"the {self.kind} is not JSON: {error}") from None
            if self.kind == "json_schema" and not isinstance(value, dict):
                raise InputError(f"a json_schema is an object, not {value!r:.40}")
            if self.kind == "choice" and not _strings(value):
                raise InputError("a choice is a list of at least one string, none of them empty")


def _strings(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(s, str) and s for s in value)


class Matcher:
    """Follows one text through its form."""

    def __init__(self, form: Form, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]) -> None:
        """Raises InputError when the form cannot be read, or nothing can fulfil it."""
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            raise MissingExtra("llguidance", "constrain", f"a text of a given {form.kind}") from None
        self._vocab_size = vocab_size
        ends = tuple(stop_ids) or ((tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ())
        if not ends:
            raise InputError("the model has no token that ends a text: a form needs one")
        tokens = _vocabulary(tokenizer, vocab_size, ends, named=form.kind == "grammar")
        limits = LLParserLimits(max_grammar_size=GRAMMAR_SIZE, initial_lexer_fuel=FIRST_FUEL, step_lexer_fuel=STEP_FUEL)
        try:
            self._matcher: Any = LLMatcher(tokens, _grammar(form), log_level=0, limits=limits)
        except ValueError as error:  # what Python reads as JSON and llguidance does not: NaN, half of a surrogate pair
            raise InputError(f"the {form.kind} cannot be read: {_first_line(str(error))}") from None
        self._check(form.kind)

    def allowed(self) -> Tensor:
        """Which tokens may come next: bool [vocab]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check("form")
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool))

    def take(self, token: int) -> bool:
        """Go on by a token. Returns whether the form is complete, so that nothing but the end could follow."""
        self._matcher.consume_token(token)
        self._check("form")
        return bool(self._matcher.is_stopped())

    def _check(self, what: str) -> None:
        if self._matcher.is_error():
            raise InputError(f"the {what} cannot be followed: {_first_line(self._matcher.get_error())}")


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[0]


def _grammar(form: Form) -> Any:
    from llguidance import LLMatcher

    if form.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(form.text, overrides={"whitespace_flexible": False})
    if form.kind == "regex":
        return LLMatcher.grammar_from_regex(form.text)
    if form.kind == "choice":
        answers = " | ".join(json.dumps(answer, ensure_ascii=False) for answer in json.loads(form.text))
        return LLMatcher.grammar_from_lark(f"start: {answers}")
    return LLMatcher.grammar_from_lark(form.text)


def _unnamed(tokenizer: str) -> str:
    """A tokenizer.json whose control tokens have names that no text spells, and are made of no others."""
    description, secret = json.loads(tokenizer), secrets.token_hex(8)
    names = {t["content"]: f"{secret}{t['id']}" for t in description["added_tokens"] if t["special"]}
    for token in description["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = description["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(word, word): i for word, i in model["vocab"].items()}
    else:  # of a Unigram: words with their scores
        model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
    if "merges" in model:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    description["post_processor"] = None  # it calls them by name
    return json.dumps(description)


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, vocab_size: int, ends: tuple[int, ...], named: bool) -> Any:
    """As llguidance reads it: a second or so, so it is kept with the tokenizer, which does not change. Only a grammar
    may call control tokens by their names; where a form spells such a name, its letters are meant."""
    from llguidance import LLTokenizer

    try:
        described = tokenizer.backend.to_str()
        return LLTokenizer(described if named else _unnamed(described), n_vocab=vocab_size, eos_token=list(ends))
    except ValueError as error:
        raise InputError(f"llguidance does not read this tokenizer: {_first_line(str(error))}") from None
