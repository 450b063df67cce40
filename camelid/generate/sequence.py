"""One text on its way: its tokens, its pages, and what it takes for it to end."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from camelid.generate.constrain import Matcher
from camelid.generate.sampling import SamplingParams, TokenLogprob, adjusted, logprob, sample
from camelid.tokenizer.stream import StreamDecoder

FinishReason = Literal["eos", "stop", "max_new_tokens", "max_length", "cancelled", "error"]


@dataclass(eq=False)
class Sequence:
    """`prompt` and then `ids`; the keys and values of the first `fed` tokens lie in `pages`, whose names are `names` as
    far as they are full; `expected` are those of what it had to read when it last waited. `proposed` are guesses at the
    next tokens, to be checked in one step; a draft that makes them has read `drafted` tokens. Texts share pages with
    those of the same `salt` only."""

    prompt: list[int]
    params: SamplingParams
    budget: int
    limit: FinishReason
    stop_ids: frozenset[int]
    generator: torch.Generator | None
    decoder: StreamDecoder | None
    matcher: Matcher | None = None
    salt: str = ""
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: FinishReason | None = None
    error: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    fed: int = 0
    pages: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    expected: list[bytes] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    drafted: int = 0

    @property
    def length(self) -> int:
        """Tokens that are known: prompt and new ones."""
        return len(self.prompt) + len(self.ids)

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens start … end - 1, the proposed ones after the known."""
        known = self.prompt[start:end] + self.ids[max(0, start - len(self.prompt)) : max(0, end - len(self.prompt))]
        return known + self.proposed[: end - start - len(known)]

    def take(self, logits: Tensor, chosen: abc.Sequence[int] = ()) -> None:
        """Choose the tokens that follow the last known one and then each proposed one that turns out to be chosen: rows
        of logits [1 + proposed, vocab]. One row at a time, so the text is the one that would come without proposals.
        `chosen` is what was chosen from them already, as `draws` allows; -1 where they are no numbers."""
        proposed, self.proposed = self.proposed, []
        for number in range(len(logits)):  # a row is only taken out where it is looked at
            try:
                token = chosen[number] if chosen and chosen[number] >= 0 else self._choose(logits[number])
                if self.params.logprobs is not None:
                    self.logprobs.append(logprob(logits[number], token, self.params.logprobs))
                self._append(token)
            except Exception as error:  # of whatever kind: it ends this text and no other
                self.finish, self.error = "error", str(error) or type(error).__name__
                return
            if self.finish or number == len(proposed) or proposed[number] != token:
                return

    @property
    def draws(self) -> tuple[float, ...] | None:
        """Texts of which this is the same may be chosen for together: how they draw from the model's own scores. None
        where a text changes these first, or where a draw depends on the one before it."""
        p = self.params
        changed = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty or p.logit_bias
        if changed or self.matcher is not None or (self.proposed and p.temperature > 0):
            return None
        return p.temperature, p.top_k, p.top_p, p.min_p, p.typical_p

    def _choose(self, row: Tensor) -> int:
        scores = adjusted(row, self.params, self.prompt, self.ids)
        if self.matcher is not None:
            scores = scores.masked_fill(~self.matcher.allowed().to(scores.device), -torch.inf)
        return sample(scores, self.params, self.generator)

    def _append(self, token: int) -> None:
        """Add a token and decide whether the text ends."""
        self.ids.append(token)
        if self.matcher is not None and self.matcher.take(token):
            self.finish = "stop"
        if token in self.stop_ids:
            self.finish = "eos"
        elif len(self.ids) >= self.budget and self.finish is None:
            self.finish = self.limit
        if self.decoder is not None:
            self.text += "" if self.finish == "eos" else self.decoder.push(token)
            self.text += self.decoder.finish() if self.finish else ""
        for stop in self.params.stop:
            at = self.text.find(stop)
            if at >= 0:
                self.text, self.finish = self.text[:at], "stop"

    def shown(self) -> int:
        """How much of the text can be shown: all when it has ended, else not the start of a stop string."""
        return len(self.text) if self.finish else _safe_end(self.text, self.params.stop)


def _safe_end(text: str, stops: abc.Sequence[str]) -> int:
    end = len(text)
    for stop in stops:
        for size in range(min(len(stop) - 1, end), 0, -1):
            if text[:end].endswith(stop[:size]):
                end -= size
                break
    return end
