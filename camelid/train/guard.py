"""What keeps a run from harm: bad steps are skipped, a bad stretch is rolled back, a stop signal saves first.

Every decision follows from numbers that all ranks share, so all ranks decide alike.
"""

from __future__ import annotations

import math
import signal
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from camelid.errors import CamelidError
from camelid.recipe import TrainSection

WINDOW, ENOUGH = 128, 32  # losses that a spike is measured against, and how many there must be


def objection(loss: float, norm: float, recent: Sequence[float], settings: TrainSection) -> str | None:
    """Why a step must not be applied; None when it may. `recent` are the losses of applied steps, newest last.

    A spike lies more than `skip_sigma` standard deviations above the mean of the last 128 losses (OLMo 2's rule,
    arXiv:2501.00656, section 3.2); 0 switches that off. A loss or gradient that is not finite is always refused.
    """
    if not math.isfinite(loss) or not math.isfinite(norm):
        return f"the loss is {loss:g}, the gradient norm {norm:g}"
    window = recent[-WINDOW:]
    if settings.skip_sigma and len(window) >= ENOUGH:
        mean, deviation = statistics.fmean(window), statistics.stdev(window)
        limit = mean + settings.skip_sigma * max(deviation, 1e-3 * abs(mean))
        if loss > limit:
            return (
                f"the loss {loss:.4f} is a spike: above {limit:.4f}, {settings.skip_sigma:g} deviations from the mean"
            )
    return None


class Stop:
    """Whether SIGTERM or Ctrl-C asked the run to end. `signal` is its number, 0 for none."""

    def __init__(self) -> None:
        self.signal = 0

    def ask(self, number: int, frame: FrameType | None) -> None:
        """A signal handler: the first signal is remembered, a second one ends the process at once."""
        if self.signal:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number


def check_whole(result: Mapping[str, Any]) -> None:
    """For what goes on from a run's result: raise KeyboardInterrupt when Ctrl-C ended the run before its time,
    CamelidError when SIGTERM did."""
    if result.get("stopped_by") == "SIGINT":
        raise KeyboardInterrupt
    if "stopped_by" in result:
        raise CamelidError(f"{result['stopped_by']} ended the training at step {result['steps']}, before its time")


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Catch SIGTERM and Ctrl-C while the block runs. In a thread, where handlers cannot be set, nothing is caught."""
    stop = Stop()
    try:
        before = {number: signal.signal(number, stop.ask) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
