"""Beam search against transformers': the same texts in the same order, with the same scores."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from camelid.auto import CausalLM
from camelid.errors import CamelidError, InputError
from camelid.generate.beam import BeamParams
from camelid.generate.engine import Engine
from camelid.generate.native import NativeRunner
from camelid.generate.runner import TorchRunner
from camelid.generate.sampling import SamplingParams
from camelid.kernels.decoder import PAGE
from camelid.kernels.library import library
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from tests.oracles.test_transformers import BASE, pair

transformers = pytest.importorskip("transformers")
needs_library = pytest.mark.skipif(library() is None, reason="the native library is not built")
FIELDS: dict[str, Any] = BASE | {
    "hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def models() -> tuple[Llama, Any]:
    return pair(FIELDS, torch.float32)


def prompt(length: int) -> list[int]:
    found: list[int] = torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return found


def theirs(model: Any, ids: list[int], stops: list[int], params: BeamParams) -> tuple[list[list[int]], list[float]]:
    found = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), do_sample=False,
        num_beams=params.num_beams, num_return_sequences=params.n, length_penalty=params.length_penalty,
        early_stopping=params.early_stopping, max_new_tokens=params.max_new_tokens, eos_token_id=stops,
        pad_token_id=96, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    texts = []
    for row in found.sequences[:, len(ids) :].tolist():
        end = next((n + 1 for n, token in enumerate(row) if token in stops), len(row))
        texts.append(row[:end])
    return texts, found.sequences_scores.tolist()


WISHES = [
    BeamParams(num_beams, n, new, length_penalty=penalty, early_stopping=early)
    for num_beams, n, new in ((2, 1, 20), (4, 4, 45), (5, 3, 70))
    for penalty in (0.0, 1.0, 2.0, -0.5)
    for early in (False, True)
]


@pytest.mark.parametrize("stops", [[7], [3, 50, 71], [*range(2, 60)]])
@pytest.mark.parametrize("kind", ["torch", pytest.param("native", marks=needs_library)])
def test_texts_and_scores(models: tuple[Llama, Any], kind: str, stops: list[int]) -> None:
    ours, reference = models
    runner = TorchRunner(ours) if kind == "torch" else NativeRunner(ours)
    engine = Engine(runner, None, stops, cache_tokens=64 * PAGE)
    ended = set()
    for number, params in enumerate(WISHES):
        ids = prompt(5 + 9 * number)  # also just before, at and after a page's end
        found = engine.beam_search(ids, params)
        texts, scores = theirs(reference, ids, stops, params)
        assert [r.ids for r in found] == texts, params
        assert [r.score for r in found] == pytest.approx(scores, rel=1e-4, abs=1e-4)
        ended |= {r.finish_reason for r in found}
    assert ended <= {"eos", "max_new_tokens"}
    assert "eos" in ended
    assert engine.scheduler.pages.taken == 0


def test_generate_takes_the_same_words(models: tuple[Llama, Any]) -> None:
    ours, reference = models
    model = CausalLM(ours.config).eval()
    model.load_state_dict(ours.state_dict())
    ids = torch.tensor([prompt(9), prompt(9)[::-1]])
    asked: Any = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 15, "eos_token_id": [7, 16],
                  "pad_token_id": 96, "length_penalty": 0.5, "early_stopping": True, "do_sample": False}  # fmt: skip
    expected = reference.generate(ids, attention_mask=torch.ones_like(ids), **asked)
    assert torch.equal(model.generate(ids, **asked), expected)
    drawn = model.generate(ids, do_sample=True, num_return_sequences=3, seed=1, max_new_tokens=8, eos_token_id=None)
    assert drawn.shape == (6, 17)
    assert torch.equal(drawn[:, :9], ids.repeat_interleave(3, 0))
    assert len({tuple(row) for row in drawn.tolist()}) == 6
    alike = model.generate(ids[:1].repeat(4, 1), do_sample=True, seed=1, max_new_tokens=8, eos_token_id=None)
    assert len({tuple(row) for row in alike.tolist()}) == 4  # equal prompts draw on their own
    for wrong, why in (
        ({"num_beams": 2, "do_sample": True}, "does not draw"), ({"num_return_sequences": 2}, "there is one"),
        ({"num_return_sequences": 0}, "from 1 to 1024"), ({"num_beams": 2, "num_return_sequences": 3}, "no more"),
        ({"num_beams": 0}, "num_beams"), ({"num_beams": -2, "num_return_sequences": 3}, "num_beams"),
        ({"num_beams": 2, "early_stopping": "never"}, "early_stopping"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=why):
            model.generate(ids, **wrong)


def test_rows_of_unlike_lengths_have_room(models: tuple[Llama, Any]) -> None:
    """A shorter prompt may need more of the cache: its beams share fewer pages, and more may follow it."""
    model = CausalLM(models[0].config).eval()
    model.load_state_dict(models[0].state_dict())
    for long, short, limit in ((64, 31, {"max_new_tokens": 20}), (200, 10, {"max_length": 256})):
        rows = torch.tensor([prompt(long), [96] * (long - short) + prompt(short)])
        mask = torch.ones_like(rows)
        mask[1, : long - short] = 0
        asked: Any = {"num_beams": 4, "eos_token_id": None, **limit}
        alone = model.generate(torch.tensor([prompt(short)]), **asked)[0, short:]
        assert torch.equal(model.generate(rows, attention_mask=mask, **asked)[1, long:][: len(alone)], alone)


def test_one_beam_is_greedy(models: tuple[Llama, Any]) -> None:
    engine = Engine(models[0], stop_ids=())
    params = BeamParams(1, max_new_tokens=40)
    greedy = engine.generate([prompt(31)], params=None)[0].ids[:40]
    assert engine.beam_search(prompt(31), params)[0].ids == greedy


def test_more_beams_find_what_is_no_less_likely(models: tuple[Llama, Any]) -> None:
    engine = Engine(models[0], stop_ids=())
    scores = [engine.beam_search(prompt(20), BeamParams(width, max_new_tokens=12))[0].score for width in (1, 8, 64)]
    assert scores[0] is not None
    assert scores[2] is not None
    assert scores[2] > scores[0]


def test_beside_other_texts(models: tuple[Llama, Any]) -> None:
    """A search and a batch in two threads over one cache: neither sees the other."""
    asked, params = [prompt(n) for n in (3, 31, 40, 64, 90)], SamplingParams(max_new_tokens=40)
    search = BeamParams(4, 4, 60)
    texts = [r.ids for r in Engine(models[0], stop_ids=()).generate(asked, params)]
    found = [r.ids for r in Engine(models[0], stop_ids=()).beam_search(prompt(70), search)]
    both = Engine(models[0], stop_ids=(), cache_tokens=26 * PAGE)  # so few that texts are sent back
    with ThreadPoolExecutor(1) as other:
        batch = other.submit(both.generate, asked, params)
        assert [r.ids for r in both.beam_search(prompt(70), search)] == found
        assert [r.ids for r in batch.result()] == texts
    assert both.scheduler.pages.taken == 0


def test_more_beams_than_texts() -> None:
    few = Llama(dataclasses.replace(LlamaConfig.from_dict(FIELDS), vocab_size=3)).eval()
    with pytest.raises(CamelidError, match="only 3 so short"):
        Engine(few, stop_ids=()).beam_search([1, 2], BeamParams(8, 8, max_new_tokens=1))


def test_a_wide_search_makes_its_own_room(models: tuple[Llama, Any]) -> None:
    model = CausalLM(models[0].config).eval()
    model.load_state_dict(models[0].state_dict())
    found = model.generate([prompt(100)], num_beams=64, max_new_tokens=400, eos_token_id=[*range(2, 60)])
    assert found.shape[0] == 1


def test_what_cannot_be_searched(models: tuple[Llama, Any]) -> None:
    for wrong, why in (
        ({"num_beams": 0}, "num_beams"), ({"n": 5}, "from 1 to 4"), ({"num_beams": 2.5}, "whole"),
        ({"num_beams": 65}, "num_beams"), ({"early_stopping": "never"}, "early_stopping"),
        ({"length_penalty": "1"}, "length_penalty"), ({"length_penalty": 11.0}, "length_penalty"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=why):
            BeamParams(**wrong)  # type: ignore[arg-type]
    small = Engine(models[0], stop_ids=(), cache_tokens=4 * PAGE)
    with pytest.raises(CamelidError, match="of the cache are needed"):
        small.beam_search(prompt(40), BeamParams(8, max_new_tokens=60))
    assert small.scheduler.pages.taken == 0
    with pytest.raises(InputError, match="token id 97"):
        small.beam_search([97], BeamParams())
