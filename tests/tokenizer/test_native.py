"""The native encoder and trainer equal the `tokenizers` library, on real text, odd text and text made to hurt."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, pre_tokenizers

from camelid.kernels import bpe
from camelid.tokenizer import byte_level
from camelid.tokenizer.load import from_folder, from_sentencepiece
from camelid.tokenizer.native import classes, native_bpe, pipeline_of
from camelid.tokenizer.patterns import GPT2, LLAMA3, QWEN2
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokenizer.train import BYTE_LEVEL_SPECIALS

from ..conftest import TEXT

pytestmark = pytest.mark.skipif(not bpe.ready(classes), reason="the native library is not built")

ODD = list("'sStTrReEvVmMlLdDſ  \t\n\r\x0b\x85\u3000\xa0\u2028 12३Ⅷ²中あ가ñéA\u0310😀-_.!?'’▁<>|\x00")
ODD += [chr(c) for c in range(0x80, 0x3000, 37)]
ODD_TEXT = st.text(st.sampled_from(ODD) | st.characters(codec="utf-8"), max_size=60)
SPLITS = {bpe.LLAMA3: LLAMA3, bpe.LLAMA3_DIGITS: QWEN2, bpe.GPT2: GPT2}


def scripts() -> list[str]:
    """Texts of over forty scripts: every block of letters below U+3000, and beyond, in words of three."""
    source = random.Random(0)
    starts = [*range(0x41, 0x3000, 0x60), *range(0x3040, 0xFF00, 0x800), *range(0x10000, 0x1F900, 0x400)]
    words = ("".join(chr(start + source.randrange(0x60)) for _ in range(3)) for start in starts for _ in range(8))
    return [
        " ".join(w) for w in zip(*[words] * 4, strict=False) if not any(0xD800 <= ord(c) < 0xE000 for c in "".join(w))
    ]


def same(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer._native is not None
    ids, offsets = tokenizer.encode_batch(texts)
    wanted, places = tokenizer._encode_batch_reference(texts)
    assert np.array_equal(offsets, places)
    assert np.array_equal(ids, wanted)


def test_the_character_table_is_the_librarys() -> None:
    """Every character beyond ASCII's control: letter, number, blank as the library's regular expressions see it."""
    table = classes()
    points = [c for c in range(len(table) + 0x2000) if not 0xD800 <= c < 0xE000]
    for bit, pattern in ((1, r"\p{L}"), (2, r"\p{N}"), (4, r"\s")):
        splitter = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
        found = {ord(c) for piece, _ in splitter.pre_tokenize_str("".join(map(chr, points))) for c in piece}
        assert found == {c for c in points if c < len(table) and table[c] & bit}


@pytest.mark.parametrize("kind", [*SPLITS, bpe.DIGITS_GPT2])
def test_text_is_cut_as_by_the_regular_expression(kind: int) -> None:
    cut = pre_tokenizers.Split(Regex(SPLITS.get(kind, GPT2)), "isolated")
    if kind == bpe.DIGITS_GPT2:
        cut = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), cut])
    points = [c for c in range(0x20, len(classes()) + 0x100) if not 0xD800 <= c < 0xE000]
    every = "".join(f"a{chr(c)}{chr(c)}." for c in points)
    ends = bpe.split(every.encode(), kind)
    assert [b - a for a, b in zip([0, *ends], ends, strict=False)] == [
        len(piece.encode()) for piece, _ in cut.pre_tokenize_str(every)
    ]

    @settings(max_examples=600, deadline=None)
    @given(ODD_TEXT)
    def equal(text: str) -> None:
        ends = bpe.split(text.encode(), kind)
        pieces = [text.encode()[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)]
        assert pieces == [piece for piece, _ in cut.pre_tokenize_str(text)]

    equal()


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_ids_equal_the_librarys(tokenizers: dict[str, Path], kind: str) -> None:
    tokenizer = from_folder(tokenizers[kind])
    same(tokenizer, [*TEXT, *scripts(), "", " ", "a" * 3000, "ab" * 2000, " " * 1000, "中" * 500, "\x00\x01\x7f"])

    @settings(max_examples=400, deadline=None)
    @given(st.lists(ODD_TEXT, max_size=3))
    def equal(texts: list[str]) -> None:
        same(tokenizer, texts)

    equal()


def test_llama2_equals_on_the_shared_corpora(data: Path) -> None:
    tokenizer = from_sentencepiece(data / "tokenizers" / "llama2" / "tokenizer.model")
    lines = (data / "corpora" / "c4_demo.jsonl").read_text().splitlines()
    chinese = (data / "corpora" / "zh" / "红楼梦.txt").read_text()[:200_000].split("\n\n")
    same(tokenizer, [json.loads(line)["text"] for line in lines] + chinese + scripts())


def test_threads_and_repetition_change_nothing(tokenizers: dict[str, Path]) -> None:
    native = from_folder(tokenizers["byte-level"])._native
    assert native is not None
    texts = [*TEXT, *scripts()]
    first, places = native.encode(texts, threads=1)
    for threads in (1, 2, 3, 8, 1000):
        ids, offsets = native.encode(texts, threads=threads)
        assert np.array_equal(ids, first)
        assert np.array_equal(offsets, places)
    assert len(native.encode([], threads=2)[0]) == 0


def test_a_word_of_megabytes(tokenizers: dict[str, Path]) -> None:
    """A merge of quadratic cost would take hours."""
    source = random.Random(0)
    word = "".join(source.choices("abcdefgh", k=2_000_000))
    for folder in tokenizers.values():
        tokenizer = from_folder(folder)
        ids, _ = tokenizer.encode_batch([word])
        assert tokenizer.decode(ids.tolist()) == word


def test_unusual_tokenizers_keep_to_the_library(tokenizers: dict[str, Path]) -> None:
    """Anything that the native path does not know is left to the reference, never guessed."""
    for kind, folder in tokenizers.items():
        whole = json.loads((folder / "tokenizer.json").read_text())
        assert pipeline_of(whole) is not None
        changes = [("normalizer", {"type": "NFC"}), ("pre_tokenizer", {"type": "Whitespace"})]
        for key, value in changes:
            assert native_bpe(whole | {key: value}) is None, (kind, key)
        if kind == "sentencepiece":
            assert native_bpe(whole | {"model": whole["model"] | {"ignore_merges": True}}) is None
        for key, value in (("dropout", 0.1), ("end_of_word_suffix", "</w>"), ("type", "WordPiece")):
            assert native_bpe(whole | {"model": whole["model"] | {key: value}}) is None, (kind, key)


def test_added_words_are_found_in_documents_as_by_the_library(tokenizers: dict[str, Path]) -> None:
    for folder in tokenizers.values():
        tokenizer = from_folder(folder)
        tokenizer.backend.add_tokens(["camelids", AddedToken("  ", normalized=True)])
        texts = ["the camelids live", "the camels live", "a  b", "a▁▁b", "a▁ b"]
        ids, _ = tokenizer.encode_batch(texts)
        wanted, _ = tokenizer._encode_batch_reference(texts)
        assert np.array_equal(ids, wanted)
        assert tokenizer.backend.token_to_id("camelids") in ids


@pytest.mark.parametrize("vocab_size", [300, 600, 2000])
def test_the_same_merges_are_learned(vocab_size: int) -> None:
    texts = [*TEXT, *scripts(), "aaaa aaaaa aaaaaaa bbbb abab ababab"]
    ours = byte_level.learn(texts, vocab_size, BYTE_LEVEL_SPECIALS, threads=1)
    theirs = byte_level.learn_reference(texts, vocab_size, BYTE_LEVEL_SPECIALS)
    assert json.loads(ours.to_str())["model"] == json.loads(theirs.to_str())["model"]
    assert ours.to_str() == byte_level.learn(texts, vocab_size, BYTE_LEVEL_SPECIALS, threads=3).to_str()


def test_the_same_merges_are_learned_from_real_text(data: Path) -> None:
    lines = (data / "corpora" / "c4_demo.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    texts.append((data / "corpora" / "zh" / "红楼梦.txt").read_text()[:200_000])
    ours, theirs = byte_level.learn(texts, 5000, []), byte_level.learn_reference(texts, 5000, [])
    assert json.loads(ours.to_str())["model"] == json.loads(theirs.to_str())["model"]
