"""Ids to text as they come: never half a character, all of it in the end."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from camelid.tokenizer.load import from_folder
from camelid.tokenizer.stream import StreamDecoder
from camelid.tokenizer.tokenizer import Tokenizer

from .test_tokenizer import TEXTS


def test_a_stream_shows_whole_characters(each: Tokenizer) -> None:
    @settings(max_examples=200, deadline=None)
    @given(TEXTS.filter(lambda text: "\ufffd" not in text), st.sampled_from(["", "before", "前 "]))
    def stream(text: str, prompt: str) -> None:
        before = each.encode(prompt, add_special_tokens=False)
        ids = each.encode(prompt + text, add_special_tokens=False, parse_special=False)
        if ids[: len(before)] != before:
            return
        decoder = StreamDecoder(each, before[-4:])
        shown = [decoder.push(i) for i in ids[len(before) :]]
        assert not any("\ufffd" in piece for piece in shown)
        assert "".join(shown) + decoder.finish() == (text if before else each.decode(ids))

    stream()


def test_a_stream_after_a_prompt_cut_inside_a_character(tokenizers: dict[str, Path]) -> None:
    for folder in tokenizers.values():
        tokenizer = from_folder(folder)
        prompt = tokenizer.encode("a你好", add_special_tokens=False)
        new = tokenizer.encode("a你好吗x", add_special_tokens=False)[len(prompt) :]
        for kept in range(1, len(prompt)):
            decoder = StreamDecoder(tokenizer, prompt[-kept:])
            assert "".join(decoder.push(i) for i in new) + decoder.finish() == "吗x"


def test_a_stream_completes_the_character_that_its_prompt_begins(tokenizers: dict[str, Path]) -> None:
    for folder in tokenizers.values():
        tokenizer = from_folder(folder)
        start = tokenizer.encode("a", add_special_tokens=False)
        rest = tokenizer.encode("a😀x", add_special_tokens=False)[len(start) :]
        for begun in range(len(rest) - 1):
            decoder = StreamDecoder(tokenizer, [*start, *rest[:begun]])
            assert "".join(decoder.push(i) for i in rest[begun:]) + decoder.finish() == "😀x"
        other = tokenizer.encode("ab", add_special_tokens=False)[len(start) :]
        for begun in range(1, len(rest) - 2):  # it is not gone on with: what the prompt holds is not the answer's
            decoder = StreamDecoder(tokenizer, [*start, *rest[:begun]])
            assert decoder.finish() == ""
            assert "".join(decoder.push(i) for i in other) + decoder.finish() == tokenizer.decode(other)


def byte_ids(tokenizer: Tokenizer) -> list[int]:
    """The token of each byte."""
    named = [tokenizer.backend.token_to_id(f"<0x{b:02X}>") for b in range(256)]
    if named[0x80] is not None:
        return named
    by_bytes = {tokenizer.token_bytes(i): i for i in range(len(tokenizer))}
    return [by_bytes[bytes([b])] for b in range(256)]


def test_a_stream_of_bytes_that_are_no_characters(each: Tokenizer) -> None:
    """A model may write them without end: they are told as they come, and no step looks at many of them again."""
    decoder, told, byte = StreamDecoder(each), "", byte_ids(each)[0x80]
    for _ in range(200):
        told += decoder.push(byte)
        assert len(decoder._waiting) + len(decoder._context) < 64
    assert 170 <= len(told) <= 200


def test_a_stream_of_any_bytes(each: Tokenizer) -> None:
    ids_of = byte_ids(each)
    if each.token(ids_of[0x80]) == "<0x80>":
        return  # there a whole decode gives up what is near such a byte

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.sampled_from([0x80, 0xE4, 0xB8, 0xAD, 0xF0, 0x9F, 0x98, 0xFF, 0x41]), max_size=80))
    def whole(data: list[int]) -> None:
        ids = [ids_of[b] for b in data]
        decoder = StreamDecoder(each)
        assert "".join(decoder.push(i) for i in ids) + decoder.finish() == each.decode(ids)

    whole()


def test_ids_of_a_padded_vocabulary_are_no_text(each: Tokenizer) -> None:
    ids = each.encode("a word", add_special_tokens=False)
    decoder = StreamDecoder(each, [len(each) + 2])
    padded = [n for i in ids for n in (i, len(each) + i)]
    assert "".join(decoder.push(i) for i in padded) + decoder.finish() == each.decode(ids)
