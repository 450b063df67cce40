"""Penalties, filters and log-probabilities beside transformers' own, and that what is drawn follows what was
computed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from camelid.errors import CamelidError, InputError
from camelid.generate.sampling import SamplingParams, adjusted, choose, generator_for, logprob, probabilities, sample

LOGITS = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 2


def processed(name: str, **options: float) -> torch.Tensor:
    """What transformers makes of the logits, after a prompt of 1, 2, 2 and a text of 3, 3, 4."""
    from transformers.generation import logits_process

    found: torch.Tensor = getattr(logits_process, name)(**options)(
        torch.tensor([[1, 2, 2, 3, 3, 4]]), LOGITS[None].clone()
    )[0]
    return found


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    ours = adjusted(LOGITS, SamplingParams(repetition_penalty=penalty), [1, 2, 2], [3, 3, 4])
    torch.testing.assert_close(ours, processed("RepetitionPenaltyLogitsProcessor", penalty=penalty))


@pytest.mark.parametrize("mass", [0.2, 0.6, 0.95])
def test_typical_p_is_transformers(mass: float) -> None:
    ours = probabilities(LOGITS, SamplingParams(temperature=1.0, typical_p=mass))
    torch.testing.assert_close(ours, processed("TypicalLogitsWarper", mass=mass).softmax(-1))


@pytest.mark.parametrize(("name", "options", "params"), [
    ("TopPLogitsWarper", {"top_p": 0.7}, SamplingParams(temperature=1.0, top_p=0.7)),
    ("TopPLogitsWarper", {"top_p": 0.9}, SamplingParams(temperature=1.0, top_p=0.9)),
    ("TopPLogitsWarper", {"top_p": 0.99}, SamplingParams(temperature=1.0, top_p=0.99)),
    ("TopKLogitsWarper", {"top_k": 5}, SamplingParams(temperature=1.0, top_k=5)),
    ("MinPLogitsWarper", {"min_p": 0.1}, SamplingParams(temperature=1.0, min_p=0.1)),
    ("TemperatureLogitsWarper", {"temperature": 0.6}, SamplingParams(temperature=0.6)),
])  # fmt: skip
def test_filters_are_transformers(name: str, options: dict[str, float], params: SamplingParams) -> None:
    torch.testing.assert_close(probabilities(LOGITS, params), processed(name, **options).softmax(-1))


WARPERS = {"temperature": "TemperatureLogitsWarper", "min_p": "MinPLogitsWarper", "top_k": "TopKLogitsWarper",
           "typical_p": "TypicalLogitsWarper", "top_p": "TopPLogitsWarper"}  # fmt: skip


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("wishes", [
    {"min_p": 0.1}, {"top_k": 6, "typical_p": 0.7}, {"typical_p": 0.8, "top_p": 0.8}, {"top_k": 7, "top_p": 0.8},
    {"min_p": 0.1, "top_k": 9, "typical_p": 0.9, "top_p": 0.7},
])  # fmt: skip
def test_filters_follow_each_other_in_the_order_that_is_told(temperature: float, wishes: dict[str, Any]) -> None:
    """docs/generation.md: the temperature, then min-p, top-k, typical-p and top-p, each on what the last one left."""
    from transformers.generation import logits_process

    wishes = {"temperature": temperature} | wishes
    scores, ids = LOGITS[None].clone(), torch.tensor([[1]])
    for name, warper in WARPERS.items():
        if name in wishes:
            option = "mass" if name == "typical_p" else name
            scores = getattr(logits_process, warper)(**{option: wishes[name]})(ids, scores)
    torch.testing.assert_close(probabilities(LOGITS, SamplingParams(**wishes)), scores[0].softmax(-1))


def test_presence_frequency_and_bias() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={7: -100.0, 9: 2.0})
    ours, expected = adjusted(LOGITS, params, [1, 2, 2], [3, 3, 4]), LOGITS.clone()
    expected[3] -= 0.5 + 2 * 0.25
    expected[4] -= 0.5 + 0.25
    expected[7] -= 100
    expected[9] += 2
    torch.testing.assert_close(ours, expected)
    assert adjusted(LOGITS, SamplingParams(), [1], [2]) is LOGITS


@pytest.mark.parametrize("params", [
    SamplingParams(temperature=1.0, seed=1), SamplingParams(temperature=0.5, seed=2),
    SamplingParams(temperature=1.0, top_k=4, seed=3), SamplingParams(temperature=2.0, top_p=0.8, seed=4),
    SamplingParams(temperature=1.0, min_p=0.05, seed=5), SamplingParams(temperature=1.0, typical_p=0.7, seed=6),
])  # fmt: skip
def test_what_is_drawn_follows_the_distribution(params: SamplingParams) -> None:
    """Chi-square over 20,000 draws: above the 99.99 % point once in 10,000 runs, and the seed is fixed."""
    logits, draws, generator = LOGITS[:12], 20_000, generator_for(params)
    chances = probabilities(logits, params).double()
    counts = torch.bincount(torch.tensor([sample(logits, params, generator) for _ in range(draws)]), minlength=12)
    assert (counts[chances == 0] == 0).all()
    kept = chances > 0
    expected = chances[kept] * draws
    statistic = float(((counts[kept] - expected) ** 2 / expected).sum())
    freedom = int(kept.sum()) - 1
    # Wilson and Hilferty's approximation of the chi-square point at 3.72 deviations.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


def test_logprobs_are_of_the_models_own_scores() -> None:
    found = logprob(LOGITS, 3, 4)
    logs = LOGITS.log_softmax(-1)
    assert found.logprob == pytest.approx(float(logs[3]))
    assert [token for token, _ in found.top] == logs.topk(4).indices.tolist()
    assert logprob(LOGITS, 3, 0).top == ()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("wishes", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"typical_p": 0.5}, {"top_k": 3}])
def test_scores_that_are_no_numbers(wishes: dict[str, Any], bad: float) -> None:
    damaged = LOGITS.clone()
    damaged[2] = bad
    params = SamplingParams(**{"temperature": 1.0, "seed": 0} | wishes)
    if wishes.get("temperature") == 0 and bad == torch.inf:
        assert sample(damaged, params, None) == 2
        return
    with pytest.raises(CamelidError, match="NaN"):
        sample(damaged, params, generator_for(params))


@pytest.mark.parametrize("name", ["top_p", "typical_p"])
@pytest.mark.parametrize("spread", [0.0, 0.05, 1.0, 6.0])
@pytest.mark.parametrize("size", [3, 255, 256, 257, 5000])
def test_few_that_are_sorted_are_those_of_all(name: str, spread: float, size: int) -> None:
    """Of equal ones the first: half of the scores here are twins."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) * spread
    logits[size - size // 2 :] = logits[: size // 2].clone()
    logs = logits.log_softmax(-1)
    keys = -logits if name == "top_p" else (-logs - (logs.exp() * -logs).sum()).abs()
    order = keys.argsort(stable=True)
    ordered = logits.softmax(-1)[order]
    for mass in (1e-9, 0.1, 0.5, 0.9, 0.9999):
        kept = ordered.cumsum(-1) - ordered < mass
        kept[0] = True
        found = probabilities(logits, SamplingParams(temperature=1.0, **{name: mass}))
        assert found.nonzero().flatten().tolist() == sorted(order[kept].tolist())


@pytest.mark.parametrize("wrong", [
    {"temperature": math.nan}, {"temperature": -1}, {"top_p": 0.0}, {"typical_p": 0.0}, {"repetition_penalty": 0.0},
    {"repetition_penalty": math.inf}, {"presence_penalty": math.nan}, {"logit_bias": {3: math.inf}}, {"logprobs": -1},
    {"logprobs": True}, {"lookup": 1.5}, {"top_k": -1}, {"min_p": 1.5}, {"seed": -1},
    {"seed": 2**70}, {"max_new_tokens": 0}, {"stop": ("",)},
])  # fmt: skip
def test_wishes_out_of_range(wrong: dict[str, Any]) -> None:
    [name] = wrong
    with pytest.raises(InputError, match="stop string" if name == "stop" else name):
        SamplingParams(**wrong)


def test_seeds_differ_in_all_their_bits() -> None:
    """Of a large one torch's generator reads the low half only."""
    drawn = []
    for seed in (5, 5 + 2**32, 5 + 2**62):
        params = SamplingParams(temperature=3.0, seed=seed)
        generator = generator_for(params)
        drawn.append([sample(LOGITS, params, generator) for _ in range(20)])
    assert len({tuple(d) for d in drawn}) == 3


def test_the_least_temperature_is_greedy() -> None:
    chances = probabilities(LOGITS, SamplingParams(temperature=1e-40))
    assert int(chances.argmax()) == int(LOGITS.argmax())
    assert float(chances.max()) == 1


@pytest.mark.parametrize("params", [
    SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=0.7, top_k=6, top_p=0.8),
    SamplingParams(temperature=1.5, min_p=0.02), SamplingParams(temperature=1.0, typical_p=0.6),
])  # fmt: skip
def test_rows_are_chosen_as_each_alone(params: SamplingParams) -> None:
    """Also where scores are equal, and beside a row that is no numbers."""
    rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)) * 2
    rows[2] = rows[2].round()
    rows[4, 7] = torch.nan

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(n) for n in range(6)]

    alone = [
        sample(row, params, g) if n != 4 else -1 for n, (row, g) in enumerate(zip(rows, generators(), strict=True))
    ]
    assert choose(rows, params, generators()) == alone
    whole = rows[[0, 1, 2, 3, 5]]
    if params.temperature:
        torch.testing.assert_close(
            probabilities(whole, params), torch.stack([probabilities(row, params) for row in whole])
        )
