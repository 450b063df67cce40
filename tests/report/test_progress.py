"""Progress in a log: shares, and a time to the end that follows the pace of late and knows what an earlier run did."""

import re
from types import SimpleNamespace

import pytest

from camelid.report import progress as module
from camelid.report.progress import RECENT, Pace, progress


class Clock:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_pace_of_late_forgets_and_a_whole_one_does_not(clock: Clock) -> None:
    pace = Pace(0, 0)
    assert pace.of_late() == pace.on_the_whole() == (0, 0)
    for done in range(1, 31):
        clock.now += 1
        pace.mark(10 * done, done)
    assert pace.of_late() == pytest.approx((10, 1))
    clock.now += 1000  # asleep
    for done in range(31, 31 + RECENT + 1):
        clock.now += 2
        pace.mark(10 * done, done)
    assert pace.of_late() == pytest.approx((5, 0.5))
    assert pace.on_the_whole()[1] == pytest.approx((31 + RECENT) / (30 + 1000 + 2 * (RECENT + 1)))


def test_a_pause_is_no_time(clock: Clock) -> None:
    pace = Pace(0)
    clock.now += 5
    pace.pause(3)
    pace.mark(8)
    assert pace.of_late() == pace.on_the_whole() == pytest.approx((4,))


def etas(text: str) -> list[str]:
    return re.findall(r"ETA (\S+)", text)


def test_a_resumed_run_is_not_told_what_it_did_before(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("run", 1000, begun=500) as advance:
        for done in (510, 520):
            clock.now += 10
            advance(done)
    assert etas(capsys.readouterr().err) == ["8:10", "8:00"]


def test_the_time_to_the_end_follows_a_machine_that_became_slower(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("run", 10_000) as advance:
        for step in range(1, 61):
            clock.now += 10
            advance(100 * step if step <= 30 else 3000 + 10 * (step - 30))
    assert etas(capsys.readouterr().err)[29::30] == ["11:40", "1:51:40"]


def test_after_a_return_the_time_is_told_anew(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("run", 100, begun=50) as advance:
        for done in (60, 40, 55):
            clock.now += 10
            advance(done, "loss 2.000")
    err = capsys.readouterr().err
    assert etas(err) == ["0:40", "-:--", "0:30"]
    assert err.splitlines()[1] == "run  40%  ETA -:--  loss 2.000"
