"""Which tokens go into the next step. Texts that are being written come first, one token each (and their share of
guesses); what room is left goes to prompts, in chunks, in the order of arrival. A text that finds no page for its next
token sends the latest arrival back to the queue; its tokens are computed again later, which changes nothing in them.
"""

from __future__ import annotations

import threading
import time
from collections import abc, deque
from contextlib import contextmanager
from itertools import islice
from operator import eq

import torch
from torch import Tensor

from camelid.errors import CamelidError
from camelid.generate.draft import MOST, Draft
from camelid.generate.lookup import propose
from camelid.generate.pages import Pages, page_names
from camelid.generate.runner import Chunk, Runner
from camelid.generate.sampling import choose
from camelid.generate.sequence import FinishReason, Sequence
from camelid.kernels.decoder import PAGE


class Scheduler:
    """Runs sequences on a runner with `pages` pages, at most `most_texts` at a time. `add`, `cancel` and `step` may be
    called from several threads; one step runs at a time."""

    def __init__(
        self, runner: Runner, pages: int, most_texts: int = 64, reuse: bool = True, draft: Draft | None = None
    ) -> None:
        self.runner, self.pages, self.most_texts, self.reuse = runner, Pages(pages), most_texts, reuse
        self.draft = draft
        self.guessed = self.came_true = 0
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preempted = 0
        self._lock = threading.RLock()

    def add(self, sequence: Sequence) -> None:
        with self._lock:
            self.waiting.append(sequence)

    def cancel(self, sequence: Sequence, reason: FinishReason = "cancelled") -> None:
        """End a text at once; its pages are free when this returns. Nothing happens to one that has ended."""
        with self._lock:
            if sequence.finish is None:
                sequence.finish = reason
                if sequence in self.waiting:
                    self.waiting.remove(sequence)
            self._leave(sequence)

    @property
    def busy(self) -> bool:
        """Whether a step would have something to do."""
        return bool(self.waiting or self.running)

    def mean_state(self, ids: abc.Sequence[int], adapter: str | None = None) -> abc.Generator[None, None, Tensor]:
        """The mean of a text's last states, float32 [hidden], after as many rounds as it has chunks: steps may come
        between them. Its pages come from those that are free, and go back. Raises CamelidError when there are not
        enough."""
        with self.pages_for(-(-len(ids) // PAGE)) as pages:
            total: Tensor | None = None
            for start in range(0, len(ids), self.runner.at_once):
                part = ids[start : start + self.runner.at_once]
                with self._lock:
                    sums = self.runner.states(Chunk(part, start, pages, 0, adapter)).double().sum(0)
                total = sums if total is None else total + sums
                yield
            assert total is not None
            return (total / len(ids)).float()

    @contextmanager
    def pages_for(self, wanted: int) -> abc.Iterator[list[int]]:
        """So many pages of the free ones, for `run`. Raises CamelidError when there are not enough."""
        with self._lock:
            if wanted > self.pages.free:
                raise CamelidError(
                    f"{wanted} pages of {PAGE} tokens of the cache are needed, {self.pages.free} are free: ask for "
                    "less at once, or make the engine with more cache_tokens"
                )
            pages = [self.pages.take() for _ in range(wanted)]
        try:
            yield pages
        finally:
            with self._lock:
                for page in pages:
                    self.pages.release(page)

    def run(self, chunks: abc.Sequence[Chunk]) -> list[Tensor]:
        """Logits of chunks in pages that `pages_for` gave, between two steps."""
        with self._lock:
            return self.runner.run(chunks)

    def copy(self, pages: abc.Sequence[tuple[int, int]]) -> None:
        """What each first one holds, into each second one."""
        with self._lock:
            self.runner.copy(pages)

    def step(self) -> list[Sequence]:
        """Compute one step; returns the texts that took tokens. Empty when there is nothing to do."""
        with self._lock:
            return self._step()

    def _step(self) -> list[Sequence]:
        planned = self._plan()
        if not planned:
            return []
        drafted = self._draft(planned)
        chunks = []
        for sequence, count in planned:
            end = min(sequence.fed + count, sequence.length + len(sequence.proposed))  # a draft may guess fewer
            done = end == sequence.length + len(sequence.proposed)
            wanted = 1 + len(sequence.proposed) if done else 0
            ids = sequence.tokens(sequence.fed, end)
            chunks.append(Chunk(ids, sequence.fed, sequence.pages, wanted, sequence.params.adapter))
        self._read({s: c.position + len(c.ids) for (s, _), c in zip(planned, chunks, strict=True) if s not in drafted})
        found = self.runner.run(chunks)
        took = []
        chosen = _chosen([sequence for sequence, _ in planned], found, self.runner.likeliest())
        for (sequence, _), chunk, logits, tokens in zip(planned, chunks, found, chosen, strict=True):
            guesses = len(sequence.proposed) if chunk.wanted else 0
            sequence.fed += len(chunk.ids) - guesses
            if chunk.wanted:
                before, proposed = len(sequence.ids), sequence.proposed
                sequence.take(logits, tokens)
                # Guesses that came true have their keys and values already; the last token has not.
                sequence.fed += max(0, len(sequence.ids) - before - 1)
                self.guessed += guesses
                self.came_true += sum(map(eq, proposed, sequence.ids[before:]))
                took.append(sequence)
            sequence.drafted = min(sequence.drafted, sequence.fed)
            self._name(sequence)
            if sequence.finish:
                self._leave(sequence)
        return took

    def _plan(self) -> list[tuple[Sequence, int]]:
        """Sequences and how many of their tokens to feed, with pages for them."""
        room = self.runner.at_once
        for sequence in self.running:  # a step that was broken off may have left more
            sequence.proposed, sequence.drafted = [], min(sequence.drafted, sequence.fed)
        planned: list[tuple[Sequence, int]] = []
        writing = [s for s in self.running if s.fed == s.length - 1]
        reading = [s for s in self.running if s.fed < s.length - 1]
        # One text's guesses stop no other text, and leave half of the step to prompts.
        share = max(1, room // (2 if reading or self.waiting else 1) // max(1, len(writing)))
        for sequence in [*writing, *reading]:
            if sequence not in self.running:  # sent back by one before it
                continue
            count = min(room, sequence.length + self._guess(sequence, share - 1) - sequence.fed)
            if count > 0 and self._extend(sequence, count):
                planned.append((sequence, count))
                room -= count
        # What a running text is just reading is not read beside it: who begins so too waits for that, and others go on.
        coming = {name for text in self.running for name in text.expected[len(text.names) :]}
        for sequence in list(self.waiting):
            if room <= 0 or len(self.running) >= self.most_texts:
                break
            self._expect(sequence)
            if coming.intersection(sequence.expected[self.pages.known(sequence.expected) :][:1]):
                continue
            if not self._enter(sequence):
                break
            self.waiting.remove(sequence)
            self.running.append(sequence)
            coming.update(sequence.expected[len(sequence.names) :])
            count = min(room, sequence.length - sequence.fed)
            if not self._extend(sequence, count):
                break
            planned.append((sequence, count))
            room -= count
        return [(sequence, count) for sequence, count in planned if sequence in self.running]

    def _guess(self, sequence: Sequence, most: int) -> int:
        """How many tokens, up to `most`, to guess for a text that has nothing else to feed than its last token: what is
        looked up is proposed at once, a draft's guesses are made when they have their pages. No more than there are
        pages for beside one for every other text, so that a guess sends nobody back. None where positions depend on how
        much is known: what is read together would be turned otherwise."""
        if not self.reuse or sequence.fed < sequence.length - 1:
            return 0
        there = (len(sequence.pages) + max(0, self.pages.free - len(self.running) + 1)) * PAGE - sequence.length
        most = max(0, min(most, there, sequence.budget - len(sequence.ids) - 1))
        if sequence.params.lookup:
            sequence.proposed = propose(sequence.prompt + sequence.ids, min(most, sequence.params.lookup))
        if sequence.proposed or self.draft is None:
            return len(sequence.proposed)
        return max(0, min(most, MOST, self.draft.context - sequence.length))

    def _draft(self, planned: abc.Sequence[tuple[Sequence, int]]) -> set[Sequence]:
        """Have the draft guess for the texts that have room for it; returns them."""
        drafted = {s: count - 1 for s, count in planned if s.fed == s.length - 1 and count > 1 and not s.proposed}
        if self.draft is not None and drafted:
            texts = [Chunk(s.tokens(s.drafted, s.length), s.drafted, s.pages) for s in drafted]
            for sequence, found in zip(drafted, self.draft.guess(texts, list(drafted.values())), strict=True):
                sequence.proposed, sequence.drafted = found, sequence.length + max(0, len(found) - 1)
        return set(drafted)

    def _read(self, ends: abc.Mapping[Sequence, int]) -> None:
        """Let the draft, if there is one, read texts up to where the model is reading them; beyond its context, where
        it guesses nothing, it need not."""
        if self.draft is not None:
            near = {s: end for s, end in ends.items() if s.drafted < self.draft.context}
            self.draft.read([Chunk(s.tokens(s.drafted, end), s.drafted, s.pages) for s, end in near.items()])
        for sequence, end in ends.items():
            sequence.drafted = end

    def _expect(self, sequence: Sequence) -> None:
        """Name the full pages of what a text is to read before its last token, which is always fed: its logits are
        wanted."""
        if self.reuse and len(sequence.expected) < (sequence.length - 1) // PAGE:
            known = sequence.tokens(0, sequence.length - 1)
            sequence.expected = page_names(known, self._salt(sequence), sequence.expected)

    def _enter(self, sequence: Sequence) -> bool:
        """Give a waiting text the known pages of its beginning. False when there is no room for the rest of it."""
        sequence.pages = self.pages.find(sequence.expected)
        sequence.names = sequence.expected[: len(sequence.pages)]
        needed = -(-sequence.length // PAGE) - len(sequence.pages)
        if needed + bool(self.running) > self.pages.free:  # beside others it would be sent back soon
            self._drop(sequence)
            return False
        sequence.fed = sequence.drafted = len(sequence.pages) * PAGE
        return True

    def _extend(self, sequence: Sequence, count: int) -> bool:
        """Pages for `count` more tokens. May send others back; False when it had to go itself."""
        while len(sequence.pages) * PAGE < sequence.fed + count:
            if self.pages.free == 0:
                last = self.running[-1]
                self._send_back(last)
                if last is sequence:
                    return False
                continue
            sequence.pages.append(self.pages.take())
        return True

    def _send_back(self, sequence: Sequence) -> None:
        self.preempted += 1
        self.running.remove(sequence)
        self._drop(sequence)
        self.waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        for page in reversed(sequence.pages):  # so that of a beginning the end is given away first
            self.pages.release(page)
        sequence.pages, sequence.names, sequence.proposed = [], [], []
        sequence.fed = sequence.drafted = 0

    def _name(self, sequence: Sequence) -> None:
        """Make the pages that have become full findable, of the draft's too."""
        full = sequence.drafted // PAGE
        if self.reuse and full > len(sequence.names):
            before = len(sequence.names)
            sequence.names = page_names(sequence.tokens(0, full * PAGE), self._salt(sequence), sequence.names)
            for page, name in zip(sequence.pages[before:full], sequence.names[before:], strict=True):
                self.pages.name(page, name)

    @staticmethod
    def _salt(sequence: Sequence) -> str:
        return f"{sequence.params.adapter or ''}/{sequence.salt}"


def _chosen(
    texts: abc.Sequence[Sequence], logits: abc.Sequence[Tensor], likeliest: abc.Sequence[int]
) -> list[abc.Sequence[int]]:
    """What is chosen from each text's rows, where that is known already, and on a GPU for all texts that draw alike at
    once: to ask for each would be to wait for each. Nothing, where a text has to choose by itself."""
    found: list[abc.Sequence[int]] = [()] * len(texts)
    alike: dict[object, list[int]] = {}
    at = 0
    for number, (text, rows) in enumerate(zip(texts, logits, strict=True)):
        count = len(rows)
        draws = text.draws if count else None
        if draws is not None and likeliest and text.params.temperature == 0:
            found[number] = likeliest[at : at + count]
        elif draws is not None and rows.is_cuda:
            alike.setdefault(draws, []).append(number)
        at += count
    for numbers in alike.values():
        generators = [texts[n].generator for n in numbers for _ in logits[n]]
        tokens = iter(choose(torch.cat([logits[n] for n in numbers]), texts[numbers[0]].params, generators))
        for n in numbers:
            found[n] = list(islice(tokens, len(logits[n])))
    return found


def run_to_end(scheduler: Scheduler, sequences: abc.Sequence[Sequence]) -> None:
    """Step until all of these have ended."""
    while any(s.finish is None for s in sequences):
        step_or_wait(scheduler)


def step_or_wait(scheduler: Scheduler) -> None:
    """A step, or a moment for another thread whose search has all pages."""
    if not scheduler.step() and not scheduler.running:
        time.sleep(0.001)
