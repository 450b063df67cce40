"""A run's speeds: of its last steps in the records, of all of them in what it returns and in the report."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from camelid.report import progress
from camelid.train import log
from camelid.train.log import Log
from camelid.train.loop import run
from camelid.train.parallel import Ranks
from camelid.train.pretrain import pretraining

from .test_train import recipe


def test_speeds_of_late_and_of_the_whole(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, step = [0.0], Log.step
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slower(log: Log, state: Any, *rest: Any) -> str:
        now[0] += 1.0 if state.step <= 10 else 4.0
        return step(log, state, *rest)

    monkeypatch.setattr(Log, "step", slower)
    chosen = recipe(tokens, tmp_path / "run", steps=40)
    result = run(pretraining(chosen, [tokens], Ranks(), quiet=True))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    speeds = [r["tokens_per_second"] for r in records]
    learned = [r["tokens"] for r in records]
    assert speeds[9] == pytest.approx(learned[9] / 10, abs=0.1)
    assert speeds[39] == pytest.approx((learned[39] - learned[19]) / 80, abs=0.1)
    whole = result["tokens"] / (10 + 30 * 4)
    assert result["tokens_per_second"] == pytest.approx(whole, abs=0.1)
    assert result["measured"]["tokens_per_second"] == result["tokens_per_second"]
    assert f" {whole:,.0f} tokens/s;" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")

    again = run(pretraining(chosen, [tokens], Ranks(), quiet=True), resume=True)  # nothing is left to do
    assert again["tokens_per_second"] == speeds[-1]


def test_a_product_that_was_timed_badly_is_timed_again(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that began while the machine was busy told 195 % of what it can do, to its end."""
    times = iter([(1.0, "while busy"), (1e10, "alone")])
    monkeypatch.setattr(log, "peak_flops", lambda _: next(times))
    result = run(pretraining(recipe(tokens, tmp_path / "run", steps=3), [tokens], Ranks(), quiet=True))
    assert result["utilization"]["of"] == "alone"
    assert 0 < result["utilization"]["value"] < 1
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < r["utilization"] < 1 for r in records)
