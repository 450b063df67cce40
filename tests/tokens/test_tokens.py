"""Order is a permutation and a pure function; windows tile the stream; documents stay apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camelid.errors import InputError
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.batch import IGNORE, PackedTokens
from camelid.tokens.order import item_at
from camelid.tokens.write import build

TEXTS = ["one two three", "骆驼在沙漠里走", "a much longer document, to cross window borders " * 8, "end"]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**32), st.integers(0, 5))
def test_each_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    items = [item_at(epoch * count + i, count, seed) for i in range(count)]
    assert sorted(items) == list(range(count))


def test_order_differs_by_seed_and_epoch_and_is_mixed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [item_at(epoch * 1000 + i, 1000, seed) for i in range(1000)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)
    steps = [abs(a - b) for a, b in zip(order(1, 0), order(1, 0)[1:], strict=False)]
    assert 280 < sum(steps) / len(steps) < 390  # a random order averages a third of the range


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    build(TEXTS, tokenizer, tmp_path / "tokens", [])
    return tmp_path / "tokens"


def test_the_stream_is_the_documents_framed(folder: Path, tokenizer: Tokenizer) -> None:
    expected = []
    for text in TEXTS:
        expected += [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    assert PackedTokens(folder, 8, 0).data.tolist() == expected


def test_an_epoch_predicts_every_token_once(folder: Path) -> None:
    source = PackedTokens(folder, 8, seed=5)
    batch = source.batch(0, len(source))
    stream = source.data[: len(source) * 8 + 1].tolist()
    seen = sorted(zip(batch.input_ids.flatten().tolist(), batch.document_ids.flatten().tolist(), strict=True))
    expected_documents = [sum(1 for s in source.starts if s <= at) for at in range(len(source) * 8)]
    assert seen == sorted(zip(stream[:-1], expected_documents, strict=True))
    starts = set(source.starts.tolist())
    supervised = sum(1 for at in range(1, len(source) * 8 + 1) if at not in starts)
    assert batch.supervised() == supervised


def test_no_label_crosses_a_document(folder: Path) -> None:
    batch = PackedTokens(folder, 8, seed=5).batch(0, 10)
    bos = 0  # a document's first token is never predicted from the one before it
    assert not (batch.labels == bos).any()
    assert (batch.labels == IGNORE).any()


def test_batches_do_not_depend_on_how_they_are_cut(folder: Path) -> None:
    source = PackedTokens(folder, 8, seed=5)
    whole = source.batch(3, 6).input_ids
    parts = torch.cat([source.batch(3, 2).input_ids, source.batch(5, 4).input_ids])
    assert torch.equal(whole, parts)


def test_too_little_text(folder: Path) -> None:
    with pytest.raises(InputError, match=r"lower train\.sequence_length"):
        PackedTokens(folder, 10_000, 0)


def test_a_folder_that_is_not_tokens(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no camelid\.json"):
        PackedTokens(tmp_path, 8, 0)
