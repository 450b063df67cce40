"""Llama 3's tiktoken vocabulary, made here from a trained one, and broken ones."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest

from camelid.errors import FormatError
from camelid.tokenizer.byte_level import learn
from camelid.tokenizer.load import from_folder, from_model_file
from camelid.tokenizer.native import character_to_byte
from camelid.tokenizer.patterns import LLAMA3
from camelid.tokenizer.tiktoken_ranks import special_tokens

from ..conftest import TEXT


def ranks() -> dict[bytes, int]:
    """A vocabulary of 400 tokens; the first 256 are bytes."""
    table = character_to_byte()
    return {
        bytes(table[c] for c in token): i
        for token, i in sorted(learn(TEXT, 400, []).get_vocab().items(), key=lambda t: t[1])
    }


def lines(found: dict[bytes, int]) -> list[str]:
    return [f"{base64.b64encode(token).decode()} {rank}" for token, rank in found.items()]


def test_equal_to_tiktoken(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    (tmp_path / "tokenizer.model").write_text("\n".join(lines(ranks())) + "\n")
    ours = from_folder(tmp_path)
    theirs = tiktoken.Encoding("x", pat_str=LLAMA3, mergeable_ranks=ranks(), special_tokens={})
    for text in [*TEXT, " and two  spaces\n\n\t", "αβγ 한국어 \x00"]:
        wanted = theirs.encode_ordinary(text)
        assert ours.encode(text, add_special_tokens=False, parse_special=False) == wanted
        assert ours.encode_documents([text]) == [wanted]
        assert ours.decode(wanted) == text


def test_control_tokens_stand_behind_the_ranks(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_text("\n".join(lines(ranks())))
    tokenizer = from_model_file(path)
    assert len(tokenizer) == 400 + 256
    assert tokenizer.bos_token_id == 400
    assert tokenizer.special_tokens[409] == "<|eot_id|>"
    assert len(set(special_tokens())) == 256
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi <|eot_id|>"}])
    assert (chat.count(400), chat.count(409)) == (1, 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda rows: [*rows[:5], "not-base64!! x", *rows[5:]], "line 6"),
        (lambda rows: rows[:-2] + rows[-1:], "none missing or double"),
        (lambda rows: [*rows, f"{base64.b64encode(b'zzz').decode()} 7"], "none missing or double"),
        (lambda rows: [*rows[:9], f"{base64.b64encode(b'zzz').decode()} 9", *rows[10:]], "no token for byte"),
    ],
)
def test_broken_vocabularies(tmp_path: Path, damage: Callable[[list[str]], list[str]], message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_text("\n".join(damage(lines(ranks()))))
    with pytest.raises(FormatError, match=message):
        from_model_file(path)
