"""Bad steps never reach the weights; a bad stretch is rolled back, then given up; schedules are what they say."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from camelid.errors import CamelidError
from camelid.formats.load import finished
from camelid.recipe import TrainSection
from camelid.tokens.batch import Batch, PackedTokens
from camelid.train import checkpoint, pretrain
from camelid.train.guard import objection
from camelid.train.log import Log
from camelid.train.loop import run
from camelid.train.loss import NextToken
from camelid.train.parallel import Ranks
from camelid.train.pretrain import pretraining
from camelid.train.schedule import drawn, learning_rate
from camelid.train.step import Job

from .test_train import recipe


def test_objections() -> None:
    settings = TrainSection()
    steady = [2.0 + 0.01 * (n % 7) for n in range(64)]
    assert objection(2.1, 1.0, steady[:10], settings) is None  # too few to judge
    assert objection(2.03, 1.0, steady, settings) is None
    assert "spike" in str(objection(3.0, 1.0, steady, settings))
    assert objection(3.0, 1.0, steady, TrainSection(skip_sigma=0)) is None
    mean, deviation = statistics.fmean(steady), statistics.stdev(steady)
    limit = mean + 6 * deviation
    assert objection(limit - 1e-6, 1.0, steady, TrainSection(skip_sigma=6)) is None
    assert "spike" in str(objection(limit + 1e-6, 1.0, steady, TrainSection(skip_sigma=6)))
    old = [9.0] * 64 + steady * 2  # only the last 128 count
    assert "spike" in str(objection(limit + 0.01, 1.0, old, TrainSection(skip_sigma=6)))
    for loss, norm in ((math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)):
        assert objection(loss, norm, [], TrainSection(skip_sigma=0)) is not None


class Poisoned:
    """A source that knows whether the rows it gave last are those whose loss is to be spoiled."""

    def __init__(self, source: PackedTokens, bad: range) -> None:
        self.source, self.bad = source, bad

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, position: int, rows: int) -> Batch:
        found = self.source.batch(position, rows)
        self.now = position in self.bad
        return found


def poisoned(folder: Path, out: Path, bad: range, by: float = math.nan, **train: Any) -> Job:
    chosen = recipe(folder, out, **{"steps": 24} | train)
    job = pretraining(chosen, [folder], Ranks(), quiet=True)
    assert isinstance(job.source, PackedTokens)
    source = job.source = Poisoned(job.source, bad)  # type: ignore[assignment]

    class Spoiled(NextToken):
        def __call__(self, model: Any, batch: Batch, z_loss: float) -> torch.Tensor:
            found = super().__call__(model, batch, z_loss)
            return found * by if source.now else found

    job.objective = Spoiled()
    return job


def test_a_bad_step_is_skipped_and_its_text_kept(tokens: Path, tmp_path: Path) -> None:
    job = poisoned(tokens, tmp_path / "run", range(20, 21))  # the sixth step of four rows
    result = run(job)
    assert (result["steps"], result["skipped_steps"]) == (24, 1)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "skipped" in r] == [6]
    assert records[5]["loss"] is None
    text = (tmp_path / "run" / "skipped" / "step-00000006.txt").read_text()
    assert "the loss is nan" in text
    assert "learn" in text or "骆驼" in text or "Numbers" in text or "def" in text
    assert all(torch.isfinite(p).all() for p in job.model.parameters())
    assert "were not applied" in (tmp_path / "run" / "report.html").read_text()


def test_a_spike_is_skipped_and_nothing_else(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss twice as large as those before it, once there are enough of them to tell."""
    job = poisoned(tokens, tmp_path / "run", range(39 * 4, 39 * 4 + 1), by=2.0, steps=44, learning_rate=1e-5)
    step, weights = Log.step, [torch.empty(0)]
    moved = job.model.embed_tokens.weight
    monkeypatch.setattr(Log, "step", lambda log, *rest: (weights.append(moved.detach().clone()), step(log, *rest))[1])
    assert run(job)["skipped_steps"] == 1
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "skipped" in r] == [40]
    assert "is a spike" in (tmp_path / "run" / "skipped" / "step-00000040.txt").read_text()
    assert [n for n in range(1, 45) if torch.equal(weights[n], weights[n - 1])] == [40]


def test_a_bad_stretch_is_rolled_back_and_passed(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 7 to 9 (positions 24 to 35) are bad: back to step 4, and on with the data after them."""
    job = poisoned(tokens, tmp_path / "run", range(24, 36), max_skips=3)
    step, worked = Log.step, []
    monkeypatch.setattr(Log, "step", lambda log, *rest: (step(log, *rest), worked.append(log.positions))[0])
    result = run(job)
    assert result["skipped_steps"] == 3
    assert worked[-1] == 29 * 4 * 32  # the steps that were taken again are work too
    last = finished(tmp_path / "run")[0]
    state = json.loads((last / "state" / "loop.json").read_text())
    assert (state["step"], state["rollbacks"], state["position"]) == (24, 1, 36 + 4 * 20)
    assert all(torch.isfinite(p).all() for p in job.model.parameters())


def test_it_gives_up_when_nothing_helps(tokens: Path, tmp_path: Path) -> None:
    job = poisoned(tokens, tmp_path / "run", range(20, 10**9), max_skips=3, max_rollbacks=2)
    with pytest.raises(CamelidError, match=r"3 steps in a row were bad .* after 2 returns"):
        run(job)
    good = checkpoint.newest_good(tmp_path / "run")
    assert good is not None
    from camelid.formats import load

    assert all(torch.isfinite(p).all() for p in load(good).parameters())


def test_what_was_learned_before_a_bad_end_is_kept(tokens: Path, tmp_path: Path) -> None:
    """There was no checkpoint yet: the weights of the last good step are one, and another rate may go on from it."""
    job = poisoned(tokens, tmp_path / "run", range(12, 10**9), max_skips=3)
    with pytest.raises(CamelidError, match=r"the weights before them are in .*step-00000006\)\. Go on with --resume"):
        run(job)
    again = pretrain(
        recipe(tokens, tmp_path / "run", steps=24, max_skips=3, learning_rate=1e-3), resume=True, quiet=True
    )
    assert (again["steps"], again["skipped_steps"]) == (24, 3)
    skipped = [
        json.loads(line).get("skipped") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [n for n, why in enumerate(skipped, 1) if why] == [4, 5, 6]


def test_schedules() -> None:
    settings = {"learning_rate": 1.0, "warmup_steps": 10, "min_learning_rate_share": 0.1}
    cosine = TrainSection(schedule="cosine", **settings)  # type: ignore[arg-type]
    for quarter in range(5):  # of the way from the end of the warm-up
        wave = 0.5 * (1 + math.cos(math.pi * quarter / 4))
        assert learning_rate(10 + 40 * quarter, 170, cosine) == pytest.approx(0.1 + 0.9 * wave)
    linear = TrainSection(schedule="linear", **settings)  # type: ignore[arg-type]
    assert abs(learning_rate(105, 200, linear) - (0.1 + 0.9 * 0.5)) < 1e-9
    wsd = TrainSection(schedule="wsd", decay_share=0.25, **settings)  # type: ignore[arg-type]
    rates = [learning_rate(s, 200, wsd) for s in range(201)]
    assert set(rates[9:151]) == {1.0}
    assert rates[150:] == sorted(rates[150:], reverse=True)
    assert abs(rates[200] - 0.1) < 1e-9
    assert "200 steps" in drawn(200, wsd)
    assert "not the recipe's 2,000" in drawn(200, TrainSection())


@pytest.mark.nightly  # most of a minute of compiling
def test_compiled_layers_learn_the_same(tokens: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch._inductor")
    losses = []
    for compiled in (False, True):
        chosen = recipe(tokens, tmp_path / str(compiled), steps=3, compile=compiled)
        losses.append(run(pretraining(chosen, [tokens], Ranks(), quiet=True))["loss"])
    assert abs(losses[0] - losses[1]) < 1e-4


def test_activation_checkpointing_changes_no_bit(tokens: Path, tmp_path: Path) -> None:
    digests = set()
    for choice in ("on", "off"):
        chosen = recipe(tokens, tmp_path / choice, steps=3, activation_checkpointing=choice)
        digests.add(run(pretraining(chosen, [tokens], Ranks(), quiet=True))["digest"])
    assert len(digests) == 1
