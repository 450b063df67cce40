"""Order is a permutation and a pure function; windows tile the stream; documents stay apart."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camelid.errors import InputError
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.batch import IGNORE, PADDING, Batch, PackedTokens, Source
from camelid.tokens.loader import batches
from camelid.tokens.mixture import BLOCK, Mixture
from camelid.tokens.order import item_at
from camelid.tokens.pack import pack
from camelid.tokens.write import STARTS, build

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


def expected_predictions(source: PackedTokens) -> list[tuple[int, int]]:
    """(token, next) within every document of the stream."""
    ends = np.load(source.folder / STARTS).tolist()
    return [
        (int(source.data[at]), int(source.data[at + 1]))
        for begin, end in itertools.pairwise(ends)
        for at in range(begin, end - 1)
    ]


def predictions(batch: Batch) -> list[tuple[int, int]]:
    kept = batch.labels != IGNORE
    return list(zip(batch.input_ids[kept].tolist(), batch.labels[kept].tolist(), strict=True))


@pytest.mark.parametrize("length", [2, 8, 31, 64])
def test_an_epoch_predicts_every_token_once(folder: Path, length: int) -> None:
    source = PackedTokens(folder, length, seed=5)
    for epoch in range(2):
        batch = source.batch(epoch * len(source), len(source))
        assert sorted(predictions(batch)) == sorted(expected_predictions(source))
        assert ((batch.document_ids == PADDING) == (batch.labels == IGNORE)).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=60), st.integers(1, 40))
def test_packing(lengths: list[int], length: int) -> None:
    """Pieces tile their documents, rows hold no more than they can, and a piece opens a row only when none has room."""
    starts = np.concatenate(([0], np.cumsum(lengths)))
    packing = pack(starts, length)
    held = [packing.sizes[a:b].sum() for a, b in itertools.pairwise(packing.rows)]
    assert all(0 < size <= length for size in held)
    covered = sorted(at for f, n in zip(packing.firsts, packing.sizes, strict=True) for at in range(f, f + n))
    assert covered == [at for a, b in itertools.pairwise(starts.tolist()) for at in range(a, b - 1)]
    assert len(held) <= -(-sum(map(int, held)) * 2 // length) + 1  # at least half full, but for one


def test_documents_of_many_lengths_fill_their_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = random.Random(0)
    build(["word " * int(source.paretovariate(1.1) * 20) for _ in range(3000)], tokenizer, tmp_path / "t", [])
    assert PackedTokens(tmp_path / "t", 128, 0).fill > 0.98


def test_no_label_crosses_a_document(folder: Path, tokenizer: Tokenizer) -> None:
    batch = PackedTokens(folder, 8, seed=5).batch(0, 10)
    assert not (batch.labels == tokenizer.bos_token_id).any()  # a document's first token is never predicted
    changes = batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
    last, following = batch.labels[:, :-1][changes], batch.input_ids[:, 1:][changes]
    assert len(last)
    assert (last != following).all()  # what comes after in the row belongs to another document


@pytest.mark.parametrize("share", [0.001, 0.1, 0.9])
def test_what_is_held_out_never_comes(folder: Path, share: float) -> None:
    whole = PackedTokens(folder, 8, seed=5)
    source = PackedTokens(folder, 8, seed=5, held_out=share)
    assert len(source.held) == len(set(source.held)) == max(1, round(share * len(whole)))

    def counted(batch: Batch) -> Counter[tuple[int, ...]]:
        return Counter(tuple(row) for row in torch.cat([batch.input_ids, batch.labels], 1).tolist())

    learned = counted(whole.batch(0, len(whole))) - counted(source.rows(source.held))
    for epoch in range(3):
        assert counted(source.batch(epoch * len(source), len(source))) == learned


def test_batches_do_not_depend_on_how_they_are_cut(folder: Path) -> None:
    source = PackedTokens(folder, 8, seed=5)
    whole = source.batch(3, 6).input_ids
    parts = torch.cat([source.batch(3, 2).input_ids, source.batch(5, 4).input_ids])
    assert torch.equal(whole, parts)


WORLDS = [(1, 0), (1, 2), (2, 0), (2, 2), (4, 0), (4, 2)]


def by_ranks(source: Source, start: int, rows: int, steps: int, world: int, workers: int) -> list[list[int]]:
    """The sequences of `steps` global batches as `world` ranks together read them."""
    ranks = [batches(source, start, rows, rank=r, world=world, workers=workers) for r in range(world)]
    read: list[list[int]] = []
    for step in range(steps):
        parts = [next(rank) for rank in ranks]
        assert {position for position, _ in parts} == {start + (step + 1) * rows}
        read += [row for _, batch in parts for row in batch.input_ids.tolist()]
    for rank in ranks:
        rank.close()
    return read


@pytest.mark.parametrize("mixed", [False, True])
def test_ranks_workers_and_resumption_read_the_same(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, mixed: bool
) -> None:
    source: Source = PackedTokens(folder, 8, seed=3)
    if mixed:
        build(TEXTS[::-1] * 2, tokenizer, tmp_path / "other", [])
        source = Mixture([PackedTokens(folder, 8, 3), PackedTokens(tmp_path / "other", 8, 3)], [1, 3], seed=3)
    rows, steps = 4, 25
    whole = source.batch(0, rows * steps).input_ids.tolist()
    for world, workers in WORLDS:
        assert by_ranks(source, 0, rows, steps, world, workers) == whole
        for resumed in range(20):
            rest = by_ranks(source, resumed * rows, rows, 2, world, workers)
            assert rest == whole[resumed * rows : (resumed + 2) * rows]


def test_a_batch_that_ranks_cannot_share(folder: Path) -> None:
    with pytest.raises(ValueError, match="evenly"):
        next(batches(PackedTokens(folder, 8, 3), 0, 6, world=4))


def test_a_mixture_keeps_its_shares_and_reads_every_row_in_turn(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    build(["another source " * 40], tokenizer, tmp_path / "other", [])
    parts = [PackedTokens(folder, 8, 1), PackedTokens(tmp_path / "other", 8, 1)]
    mixture = Mixture(parts, [0.3, 0.7], seed=9)
    places = [mixture.place(p) for p in range(4 * BLOCK)]
    for number, share in ((0, 0.3), (1, 0.7)):
        own = [at for source, at in places if source == number]
        assert abs(len(own) - share * len(places)) <= 1
        assert own == list(range(len(own)))  # each position of the source once and in turn, so each row once an epoch
    assert places != [mixture.place(p) for p in range(4 * BLOCK, 8 * BLOCK)]
    assert Mixture(parts, [3, 7], seed=9).place(777) == mixture.place(777)
    once = [mixture.place(p) for p in range(len(mixture))]
    for number, part in enumerate(parts):
        assert {at for source, at in once if source == number} >= set(range(len(part)))
    source, at = once[-1]
    assert at == len(parts[source]) - 1  # no position too many


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, 1e-6], [1.0, -1.0]])
def test_weights_that_make_no_sense(folder: Path, weights: list[float]) -> None:
    with pytest.raises(InputError, match=r"data\.weights"):
        Mixture([PackedTokens(folder, 8, 1)] * 2, weights, seed=0)


def test_too_little_text(folder: Path) -> None:
    with pytest.raises(InputError, match=r"lower train\.sequence_length"):
        PackedTokens(folder, 10_000, 0)


def test_a_folder_that_is_not_tokens(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no camelid\.json"):
        PackedTokens(tmp_path, 8, 0)
