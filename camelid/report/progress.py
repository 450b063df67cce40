"""Progress with an ETA on stderr: a live bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

RECENT = 20  # marks that a pace of late goes back


class Advance(Protocol):
    """Called with the work done so far (same unit as the total) and a short note such as the loss."""

    def __call__(self, done: float, note: str = "") -> None: ...


class Pace:
    """How fast counts grow, a second: of late, which follows a machine that became slower, and on the whole."""

    def __init__(self, *counts: float) -> None:
        self._paused = 0.0
        self._first = time.monotonic(), counts
        self._marks = deque([self._first], maxlen=RECENT + 1)

    def pause(self, seconds: float) -> None:
        """What was done for so long counts for nothing."""
        self._paused += seconds

    def mark(self, *counts: float) -> None:
        """The counts now."""
        self._marks.append((time.monotonic() - self._paused, counts))

    def of_late(self) -> tuple[float, ...]:
        return self._since(self._marks[0])

    def on_the_whole(self) -> tuple[float, ...]:
        return self._since(self._first)

    def _since(self, then: tuple[float, tuple[float, ...]]) -> tuple[float, ...]:
        now = self._marks[-1]
        seconds = max(now[0] - then[0], 1e-9)
        return tuple((new - old) / seconds for new, old in zip(now[1], then[1], strict=True))


def _silent(done: float, note: str = "") -> None:
    pass


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


@contextmanager
def progress(
    label: str, total: float, quiet: bool = False, every: float = 10.0, begun: float = 0.0
) -> Iterator[Advance]:
    """Show progress of `label` up to `total`. `every` is the seconds between two lines when not on a terminal; `begun`
    is what an earlier run had done."""
    if quiet:
        yield _silent
    elif sys.stderr.isatty():
        with _bar(label, total, begun) as advance:
            yield advance
    else:
        yield _lines(label, total, every, begun)


def _lines(label: str, total: float, every: float, begun: float) -> Advance:
    started = last = time.monotonic()
    pace, reached = Pace(begun), begun

    def advance(done: float, note: str = "") -> None:
        nonlocal last, pace, reached
        now = time.monotonic()
        if done < reached:  # after a return to an earlier step
            pace = Pace(done)
        reached = done
        if done > 0 and (now - last >= every or (done >= total and now - started >= 2)):
            last = now
            pace.mark(done)
            speed = pace.of_late()[0]
            left = clock(max(total - done, 0) / speed) if speed > 0 else "-:--"
            share = done / total if total else 1.0
            print(f"{label} {share:4.0%}  ETA {left}  {note}".rstrip(), file=sys.stderr, flush=True)

    return advance


@contextmanager
def _bar(label: str, total: float, begun: float) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=10.0 * RECENT) as bar:
        task = bar.add_task(label, total=total, completed=int(begun), note="")

        def advance(done: float, note: str = "") -> None:
            bar.update(task, completed=done, note=note)

        yield advance


def followed(texts: Iterable[str], label: str, total_bytes: int, quiet: bool = False) -> Iterator[str]:
    """The same texts, with progress in bytes of UTF-8; without a total, in silence."""
    with progress(label, total_bytes or 1, quiet or not total_bytes) as advance:
        done = 0
        for text in texts:
            yield text
            done += len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
            advance(done)
