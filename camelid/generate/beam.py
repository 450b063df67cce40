"""Beam search: the texts whose log-probability, divided by length^length_penalty, is greatest among those that a search
of fixed width meets. The rules are those of transformers (`_beam_search`), so its texts are too.

All beams are one step's texts. They share the pages of the prompt and of what they have in common; only the page that
is not full is copied when a beam goes on in several ways.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from camelid.errors import CamelidError, InputError
from camelid.generate.runner import Chunk
from camelid.generate.sampling import whole, within
from camelid.generate.scheduler import Scheduler
from camelid.kernels.decoder import PAGE

MOST_BEAMS = 64


@dataclass(frozen=True)
class BeamParams:
    """A search's wishes; `n` texts are returned, the best first. `max_new_tokens` and `max_length` as in
    SamplingParams.

    length_penalty above 0 favours long texts, for log-probabilities are negative; 0 compares them as they are. With
    early_stopping the search ends when num_beams texts have ended, else when no open beam, over its length so far,
    is better than the last of them. Raises InputError for a value out of range.
    """

    num_beams: int = 4
    n: int = 1
    max_new_tokens: int | None = None
    max_length: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        whole("num_beams", self.num_beams, 1, MOST_BEAMS)
        whole("the number of texts of a search", self.n, 1, self.num_beams)
        within("length_penalty", self.length_penalty, -10, 10)
        if not isinstance(self.early_stopping, bool):
            raise InputError(f"early_stopping must be True or False, not {self.early_stopping!r}")


@dataclass(frozen=True)
class Hypothesis:
    """A text that has ended, by an end token or at the limit."""

    score: float
    ids: list[int]
    ended: bool


@dataclass(frozen=True)
class _Beam:
    total: float  # log-probability of `ids`
    ids: list[int]
    parent: int


def beam_search(
    scheduler: Scheduler, prompt: Sequence[int], stop_ids: frozenset[int], budget: int, params: BeamParams
) -> list[Hypothesis]:
    """At most num_beams texts of at most `budget` new tokens, the best first. Raises CamelidError when the cache has no
    room for the beams, or the scores are no numbers."""
    width = params.num_beams
    with scheduler.pages_for(pages_needed(len(prompt), budget, width)) as pages:
        forks = _Forks(scheduler, pages)
        logits = _read(scheduler, prompt, forks, params.adapter)
        beams = [_Beam(0.0, [], 0)]
        done: list[Hypothesis] = []
        for length in range(1, budget + 1):
            running: list[_Beam] = []
            for rank, beam in enumerate(_candidates(logits, beams, width * max(2, 1 + len(stop_ids)))):
                ended = beam.ids[-1] in stop_ids
                if not ended and length < budget:
                    running.append(beam)
                elif rank < width:
                    done.append(Hypothesis(beam.total / length**params.length_penalty, beam.ids, ended))
            beams = running[:width]
            done = sorted(done, key=lambda found: -found.score)[:width]
            if not beams or _over(done, beams, length, params):
                break
            forks.go_on(len(prompt) + length - 1, [beam.parent for beam in beams])
            tables = forks.tables_for(len(prompt) + length)
            chunks = [
                Chunk(beam.ids[-1:], len(prompt) + length - 1, table, 1, params.adapter)
                for beam, table in zip(beams, tables, strict=True)
            ]
            logits = torch.cat(scheduler.run(chunks))
    if len(done) < params.n:
        raise CamelidError(f"{params.n} texts were asked for, but there are only {len(done)} so short")
    return done


def pages_needed(prompt: int, budget: int, beams: int) -> int:
    """Of the cache, for a prompt of so many tokens and beams of `budget` tokens that have nothing in common."""
    return prompt // PAGE + beams * (-(-(prompt + budget) // PAGE) - prompt // PAGE)


def _over(done: Sequence[Hypothesis], beams: Sequence[_Beam], length: int, params: BeamParams) -> bool:
    if len(done) < params.num_beams:
        return False
    return params.early_stopping or beams[0].total / length**params.length_penalty <= done[-1].score


def _read(scheduler: Scheduler, prompt: Sequence[int], forks: _Forks, adapter: str | None) -> Tensor:
    """Feed the prompt; logits [1, vocab] after it."""
    most = scheduler.runner.at_once
    [table] = forks.tables_for(len(prompt))
    for start in range(0, len(prompt), most):
        part = prompt[start : start + most]
        last = start + most >= len(prompt)
        [logits] = scheduler.run([Chunk(part, start, table, int(last), adapter)])
    return logits


def _candidates(logits: Tensor, beams: Sequence[_Beam], most: int) -> list[_Beam]:
    """The likeliest ways to go on by one token, the best first."""
    before = torch.tensor([beam.total for beam in beams], device=logits.device)
    scores = (logits.float().log_softmax(-1) + before[:, None]).flatten()
    best = scores.topk(min(most, len(scores)))
    if best.values.isnan().any():
        raise CamelidError("the model's scores are not numbers (NaN): its weights are damaged")
    vocab = logits.shape[1]
    return [
        _Beam(score, [*beams[at // vocab].ids, at % vocab], at // vocab)
        for score, at in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


class _Forks:
    """Which of some pages each beam reads. Full ones are shared by all that came from one beam."""

    def __init__(self, scheduler: Scheduler, pages: Sequence[int]) -> None:
        self._scheduler, self._free = scheduler, list(pages)
        self._tables: list[list[int]] = [[]]
        self._readers: Counter[int] = Counter()

    def tables_for(self, tokens: int) -> list[list[int]]:
        """Each beam's pages, with room for so many tokens."""
        for table in self._tables:
            while len(table) * PAGE < tokens:
                table.append(self._free.pop())
                self._readers[table[-1]] = 1
        return self._tables

    def go_on(self, fed: int, parents: Sequence[int]) -> None:
        """Beams that go on from `parents`, by number; `fed` tokens of each have their keys and values."""
        children = Counter(parents)
        for number, table in enumerate(self._tables):
            for page in table:
                self._readers[page] += children[number] - 1
                if self._readers[page] == 0:
                    self._free.append(page)
        copies, tables = [], []
        for parent in parents:
            table = list(self._tables[parent])
            children[parent] -= 1
            if children[parent] and fed % PAGE:  # the last child goes on in the page itself
                self._readers[table[-1]] -= 1
                copies.append((table[-1], self._free.pop()))
                table[-1] = copies[-1][1]
                self._readers[table[-1]] = 1
            tables.append(table)
        self._tables = tables
        if copies:
            self._scheduler.copy(copies)
