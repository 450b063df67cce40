"""The engine's thread. The event loop never waits for a step: what it wants goes into an inbox that is emptied between
steps, and what a step brought is told to the loop."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from camelid.generate.engine import Engine
from camelid.generate.sampling import TokenLogprob
from camelid.generate.sequence import FinishReason, Sequence


@dataclass(frozen=True)
class Progress:
    """What can be told of a text: `text` as far as it may be shown, its first `tokens` ids."""

    text: str = ""
    tokens: int = 0
    finish: FinishReason | None = None
    error: str | None = None


class Ticket:
    """A text that was handed in. Its `progress` is replaced as a whole, so a reader never sees half of a step."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence, self.progress = sequence, Progress()
        self.begun = time.perf_counter()
        self.first: float | None = None  # seconds until the first token
        self.changed = asyncio.Event()

    async def after(self, seen: Progress) -> Progress:
        """Wait for more than `seen`."""
        while self.progress == seen:
            await self.changed.wait()
            self.changed.clear()
        return self.progress

    def logprobs(self, start: int, end: int) -> list[TokenLogprob]:
        return self.sequence.logprobs[start:end]


class Worker:
    """Runs the engine's steps in a thread of its own from `start` to `stop`. All other methods are for the
    loop."""

    def __init__(self, engine: Engine, broken: Callable[[BaseException], None]) -> None:
        self.engine, self._broken = engine, broken
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: dict[Sequence, Ticket] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failures = 0  # steps that raised since one brought a token
        self.reserved = 0  # texts that are being prepared, and calls of `do` that wait
        self._calls: deque[Callable[[], None]] = deque()

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step, and every text."""
        self._inbox.put(None)
        self._thread.join()

    def end_all(self) -> None:
        """Every text ends after the present step, as cancelled."""
        for ticket in list(self._tickets.values()):
            self._inbox.put(partial(self._end, ticket.sequence))

    def _end(self, sequence: Sequence) -> None:
        if sequence.finish is None:
            self.engine.scheduler.cancel(sequence)
            self._tell([sequence])

    @property
    def pending(self) -> int:
        """Texts that wait or run, and what else was handed in."""
        return len(self._tickets) + self.reserved

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and self.failures < 3

    def add(self, sequence: Sequence) -> Ticket:
        ticket = Ticket(sequence)
        self._tickets[sequence] = ticket
        self._inbox.put(lambda: self.engine.scheduler.add(sequence))
        return ticket

    def drop(self, ticket: Ticket) -> None:
        """The text ends, whether it has ended or not, and what it held is free after the present step."""
        if self._tickets.pop(ticket.sequence, None) is not None:
            self._inbox.put(lambda: self.engine.scheduler.cancel(ticket.sequence))

    async def do(self, function: Callable[[], Any]) -> Any:
        """Call a function between two steps, in the engine's thread; one each time, and none whose caller has left."""
        assert self._loop is not None
        loop, done = self._loop, self._loop.create_future()

        def call() -> None:
            if done.cancelled():
                return
            try:
                value, error = function(), None
            except Exception as caught:
                value, error = None, caught
            loop.call_soon_threadsafe(_settle, done, value, error)

        self._inbox.put(partial(self._calls.append, call))
        return await done

    def later(self, function: Callable[[], Any]) -> None:
        """Call a function between two steps, in the engine's thread, whoever waits."""
        self._inbox.put(function)

    def _run(self) -> None:
        scheduler = self.engine.scheduler
        while self._empty_inbox(wait=not scheduler.busy and not self._calls):
            if self._calls:
                self._calls.popleft()()
            try:
                took = scheduler.step()
                self.failures = 0 if took else self.failures  # a step with nothing to do proves nothing
            except Exception as error:  # one text's fault ends that text in the scheduler; this is the engine's own
                self.failures += 1
                self._broken(error)
                took = [*scheduler.running, *scheduler.waiting]
                for sequence in took:
                    sequence.error = "the engine failed"
                    scheduler.cancel(sequence, "error")
            self._tell(took)
        for sequence in [*scheduler.running, *scheduler.waiting]:
            scheduler.cancel(sequence)
            self._tell([sequence])

    def _empty_inbox(self, wait: bool) -> bool:
        """False when the thread is to end."""
        while True:
            try:
                wish = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if wish is None:
                return False
            wish()
            wait = False

    def _tell(self, sequences: Iterable[Sequence]) -> None:
        news = [(s, Progress(s.text[: s.shown()], len(s.ids), s.finish, s.error)) for s in sequences]
        assert self._loop is not None
        if news and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hear, news)

    def _hear(self, news: list[tuple[Sequence, Progress]]) -> None:
        for sequence, progress in news:
            ticket = self._tickets.get(sequence)
            if ticket is not None:
                ticket.progress = progress
                ticket.first = ticket.first or time.perf_counter() - ticket.begun
                ticket.changed.set()


def _settle(done: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if done.cancelled():
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(value)
