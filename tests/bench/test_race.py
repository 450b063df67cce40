"""The race: turns, medians, ratios; a peer that fails is reported as missing, never as beaten."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from camelid.bench import data, race, tokens, train
from camelid.bench.race import Contestant, ratios
from camelid.errors import CamelidError
from camelid.kernels import bpe, threads
from camelid.tokenizer.native import classes

SCRIPT = """
import json, sys
log = open(sys.argv[2], "a+"); log.write(sys.argv[0][-6:-3]); log.seek(0)
turns = len(log.read()) // 3
print(json.dumps({"value": VALUE + turns, "unit": "MB/s", "version": "1"}))
"""


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(race, "SCRIPTS", tmp_path)
    (tmp_path / "one.py").write_text(SCRIPT.replace("VALUE", "100"))
    (tmp_path / "two.py").write_text(SCRIPT.replace("VALUE", "50"))
    (tmp_path / "bad.py").write_text("raise SystemExit('it broke')")
    return tmp_path


def test_contestants_take_turns_and_failures_are_told(scripts: Path) -> None:
    log = scripts / "log"
    runners = [
        Contestant("camelid", "one.py", "t"),
        Contestant("peer", "two.py", "t"),
        Contestant("other", "bad.py", "t"),
    ]
    rows = race.race(runners, log, rounds=3, quiet=True)
    assert log.read_text() == "onetwo" * 3
    assert rows[0]["rounds"] == [101, 103, 105]
    assert rows[0]["value"] == 103
    assert rows[2]["error"] == "it broke"
    assert ratios(rows) == {"t: camelid / peer": round(103 / 54, 3)}


def test_a_peer_that_cannot_be_installed_is_missing(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "interpreter", lambda c: None if c.packages else Path(sys.executable))
    rows = race.race([Contestant("peer", "one.py", "t", ("nothing==0",))], scripts / "log", 1, quiet=True)
    assert rows == [
        {"implementation": "peer", "task": "t", "threads": 1, "error": "pip could not install nothing==0"},
    ]


def test_only_our_own_waits_as_the_command_line_does(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "interpreter", lambda c: Path(sys.executable))
    monkeypatch.delenv(threads.POLICY, raising=False)
    monkeypatch.setenv(threads.SPINS, threads.FEW)
    value = f"int(os.environ.get('{threads.SPINS}', -1))"
    (scripts / "told.py").write_text(
        f"import json, os\nprint(json.dumps({{'value': {value}, 'unit': 'spins', 'version': '1'}}))"
    )
    runners = [Contestant("camelid", "told.py", "t"), Contestant("peer", "told.py", "t", ("peer==1",))]
    assert [row["value"] for row in race.race(runners, scripts / "log", 1, quiet=True)] == [int(threads.FEW), -1]


def test_our_own_contestant_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CONTESTANTS", [c for c in data.CONTESTANTS if not c.packages])
    racing = tokens.contestants
    monkeypatch.setattr(tokens, "contestants", lambda threads: [c for c in racing(threads) if not c.packages])
    line = json.dumps({"text": "Some words to race on, again and again. " * 30}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 4)
    result = data.run(str(tmp_path / "a.jsonl"), rounds=1, pipeline_megabytes=[1.5], quiet=True)
    raced = [(row["task"], row["threads"]) for row in result["rows"]]
    assert raced == [("filters", 1), ("minhash", 1), ("train", 1), ("encode", 1), ("encode", 2), ("pipeline 1.5 MB", 1)]
    if bpe.ready(classes):
        assert result["same_ids"] == {"camelid": True}
    assert all(row["value"] > 0 for row in result["rows"] if row["task"] != "encode" or bpe.ready(classes))
    assert result["rows"][-1]["input_bytes"] > 1_500_000


@pytest.mark.parametrize("task", ["full", "lora"])
def test_our_own_training_contestant_runs(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train.CONFIGS, "S", ("15m", 1, 256))
    racing = train.contestants
    monkeypatch.setattr(train, "contestants", lambda *rest: [c for c in racing(*rest) if not c.packages])
    rows = train.run(["S"], rounds=1, threads=(1,), steps=3, quiet=True, task=task)["rows"]
    assert [row["implementation"] for row in rows] == ["camelid", *([train.IN_BYTES] if task == "lora" else [])]
    for row in rows:
        losses = row["losses"]
        assert len(losses) == 3
        # Random weights know nothing, and an adapter begins as nothing.
        assert losses[0] == pytest.approx(math.log(32000), abs=0.1)
        assert losses[0] != losses[1]
        # An adapter on a model so small takes less than its loading did.
        assert (0 if task == "lora" else 1) <= row["peak_of_training"] < row["peak_bytes"]
        assert row["value"] > 0
    assert len({row["losses"][0] for row in rows}) == len(rows)  # a base in int8 is another one


def test_no_speed_where_figures_differ() -> None:
    def rows(*figures: float) -> list[dict[str, Any]]:
        each = [{"implementation": "x", "threads": n, "value": 1.0, "sum": f} for n, f in enumerate(figures)]
        return [*each, {"implementation": "y", "threads": 1, "error": "missing"}]

    race.agree(rows(100.0, 100.4), lambda r: float(r["sum"]), 0.5, "sums")
    for figures in ((100.0, 101.0), (100.0, math.nan), (math.inf, math.inf)):
        with pytest.raises(CamelidError, match=r"sums differ, so no speed is given.*x, 1 threads"):
            race.agree(rows(*figures), lambda r: float(r["sum"]), 0.5, "sums")
