"""Progress with an ETA on stderr: a live bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Called with the work done so far (same unit as the total) and a short note such as the loss."""

    def __call__(self, done: float, note: str = "") -> None: ...


def _silent(done: float, note: str = "") -> None:
    pass


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


@contextmanager
def progress(label: str, total: float, quiet: bool = False, every: float = 10.0) -> Iterator[Advance]:
    """Show progress of `label` up to `total`. `every` is the seconds between two lines when not on a terminal."""
    if quiet:
        yield _silent
    elif sys.stderr.isatty():
        with _bar(label, total) as advance:
            yield advance
    else:
        yield _lines(label, total, every)


def _lines(label: str, total: float, every: float) -> Advance:
    started = last = time.monotonic()

    def advance(done: float, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if done > 0 and (now - last >= every or (done >= total and now - started >= 2)):
            last = now
            left = (now - started) * max(total - done, 0) / done
            share = done / total if total else 1.0
            print(f"{label} {share:4.0%}  ETA {clock(left)}  {note}".rstrip(), file=sys.stderr, flush=True)

    return advance


@contextmanager
def _bar(label: str, total: float) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, note="")

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
