"""How the next token is chosen. Penalties and biases first, then temperature, then min-p, top-k, typical-p, top-p, each
on what the one before left. Temperature 0 is the argmax after penalties and biases."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from camelid.errors import CamelidError, InputError
from camelid.generate.constrain import Form


@dataclass(frozen=True)
class SamplingParams:
    """One request's wishes. Raises InputError for a value out of range.

    temperature 0 is greedy. top_k 0, top_p 1 and typical_p 1 are off. min_p drops tokens less likely than min_p times
    the likeliest; typical_p keeps the tokens whose surprise is nearest to the expected one, up to that mass
    (arXiv:2202.00666). repetition_penalty divides the scores of tokens that the prompt or the text holds (multiplies
    negative ones; arXiv:1909.05858); frequency_penalty is taken off for each time that the text holds a token,
    presence_penalty once. `logit_bias` is added to the scores of token ids.

    `max_length` counts prompt and new tokens together, `max_new_tokens` new ones; both may be given and the first one
    met ends the text. `stop` strings end it too and are left out of the text; one that is a control token's name ends
    it at that token, which no text holds, also with `ignore_eos`. `logprobs` asks for the log-probability
    of each token and of that many likeliest ones. `adapter` names one of the model's adapters; None is the one that is
    active, if any. `lookup` guesses up to that many tokens a step from what followed the same words before; the text
    does not change. `form` is what the text must be, which ends it too.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()  # one string, or several
    ignore_eos: bool = False
    logprobs: int | None = None
    adapter: str | None = None
    lookup: int = 0
    form: Form | None = None

    def __post_init__(self) -> None:
        within("temperature", self.temperature, 0, 100)
        within("top_p", self.top_p, 0, 1)
        within("min_p", self.min_p, 0, 1)
        within("typical_p", self.typical_p, 0, 1)
        within("repetition_penalty", self.repetition_penalty, 0.01, 100)
        within("presence_penalty", self.presence_penalty, -100, 100)
        within("frequency_penalty", self.frequency_penalty, -100, 100)
        for token, bias in self.logit_bias.items():
            within(f"logit_bias of token {token}", bias, -1000, 1000)
        for name in ("max_new_tokens", "max_length"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 1)
        for name in ("top_k", "lookup", "logprobs"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 0)
        for name in ("top_p", "typical_p"):
            if getattr(self, name) == 0:
                raise InputError(f"{name} must be above 0: at 0 no token is left")
        if self.seed is not None and (not isinstance(self.seed, int) or not 0 <= self.seed < 2**63):
            raise InputError(f"seed must be a whole number from 0 to 2^63 - 1, not {self.seed!r}")
        one = isinstance(self.stop, str)  # not its letters
        object.__setattr__(self, "stop", (self.stop,) if one else tuple(self.stop))
        wrong = next((s for s in self.stop if not isinstance(s, str)), None)
        if wrong is not None:
            raise InputError(f"a stop string is {wrong!r}, which is no string")
        if any(not s for s in self.stop):
            raise InputError("a stop string is empty: it would end every text at once")

    def budget(self, prompt_tokens: int, default: int = 256) -> tuple[int, Literal["max_new_tokens", "max_length"]]:
        """How many tokens may follow a prompt, and the name of the limit that says so."""
        limits: list[tuple[int, Literal["max_new_tokens", "max_length"]]] = []
        if self.max_new_tokens is not None:
            limits.append((self.max_new_tokens, "max_new_tokens"))
        if self.max_length is not None:
            limits.append((self.max_length - prompt_tokens, "max_length"))
        return min(limits, default=(default, "max_new_tokens"))


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise InputError for what is no number between the two."""
    if not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
        raise InputError(f"{name} must be between {low} and {high}, not {value!r}")


def nth(params: SamplingParams, number: int) -> SamplingParams:
    """What the text of this number, from 0, is drawn by where several are asked for: the seed goes up by one."""
    return params if params.seed is None or number == 0 else replace(params, seed=(params.seed + number) % 2**63)


def whole(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise InputError for what is no whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        room = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{name} must be a whole number {room}, not {value!r}")


def adjusted(logits: Tensor, params: SamplingParams, prompt: Sequence[int], text: Sequence[int]) -> Tensor:
    """logits [vocab] after penalties for what the prompt and the text so far hold, and biases; the same tensor when
    there are none."""
    penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    if not penalised and not params.logit_bias:
        return logits
    scores = logits.float().clone()
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *text}), dtype=torch.int64, device=scores.device)
        before, penalty = scores[seen], params.repetition_penalty
        scores[seen] = torch.where(before > 0, before / penalty, before * penalty)
    if text and (params.presence_penalty or params.frequency_penalty):
        counts = torch.bincount(torch.tensor(text, device=scores.device), minlength=len(scores)).to(scores)
        scores -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    return scores


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distributions sampled from: logits [..., vocab] -> float32 likewise, each summing to 1, after all filters."""
    scores = logits.float()
    # The likeliest stays a number at any temperature; float32 knows none below the least one here.
    scores = (scores - scores.amax(-1, keepdim=True)) / max(params.temperature, 1e-30)
    if params.min_p > 0:
        scores = scores.masked_fill(scores < scores.amax(-1, keepdim=True) + math.log(params.min_p), -torch.inf)
    if 0 < params.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[..., -1:], -torch.inf)
    if params.typical_p < 1:
        logs = scores.log_softmax(-1)
        surprise = -logs
        expected = (logs.exp() * surprise.nan_to_num(0, 0, 0)).sum(-1, keepdim=True)
        scores = _nearest(scores, (surprise - expected).abs(), params.typical_p)
    if params.top_p < 1:
        scores = _likeliest(scores, params.top_p)
    return scores.softmax(-1)


def _nearest(scores: Tensor, distance: Tensor, mass: float) -> Tensor:
    """The nearest tokens, until their probability reaches `mass`; the one that reaches it is kept."""
    order = distance.argsort(stable=True)
    kept = _until(scores.softmax(-1).gather(-1, order), mass)
    beyond = torch.arange(scores.shape[-1], device=scores.device) >= kept
    return scores.masked_fill(torch.empty_like(beyond).scatter_(-1, order, beyond), -torch.inf)


def _likeliest(scores: Tensor, mass: float) -> Tensor:
    """The likeliest tokens, likewise; of equal ones the first. Only values are sorted, for which numpy is fast."""
    if scores.device.type == "cpu":
        falling = -torch.from_numpy(np.sort((-scores).numpy()))
    else:
        falling = scores.sort(descending=True).values
    kept = _until(falling.softmax(-1), mass)
    least = falling.gather(-1, kept - 1)
    chosen = scores >= least
    if not torch.equal(chosen.sum(-1, keepdim=True), kept):
        equal, above = scores == least, scores > least
        chosen = above | (equal & (equal.cumsum(-1) <= kept - above.sum(-1, keepdim=True)))
    return scores.masked_fill(~chosen, -torch.inf)


def _until(chances: Tensor, mass: float) -> Tensor:
    """How many of them, in order, reach `mass`: [..., 1]; the first at least, though a tiny mass be 0 in float32."""
    before = chances.cumsum(-1) - chances
    return (before < mass).sum(-1, keepdim=True).clamp_(min=1)


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator | None) -> int:
    """Choose one token from logits [vocab]. Raises CamelidError when they are no numbers."""
    [token] = choose(logits[None], params, [generator])
    if token < 0:
        raise CamelidError("the model's scores are not numbers (NaN): its weights are damaged")
    return token


def choose(logits: Tensor, params: SamplingParams, generators: Sequence[torch.Generator | None]) -> list[int]:
    """One token from each row of logits [rows, vocab], by its generator; -1 where they are no numbers."""
    if params.temperature == 0 and logits.device.type == "cpu":  # torch takes five times as long over a row
        rows = logits.detach().float().numpy()
        likeliest = rows.argmax(-1).tolist()  # the first that is no number, where there is one
        return [token if row[token] == row[token] else -1 for row, token in zip(rows, likeliest, strict=True)]
    best = logits.max(-1)
    if params.temperature == 0:
        real, found = ~best.values.isnan(), best.indices
    else:
        # Above 0 and at most the whole: no token without a chance is found. torch.multinomial takes ten times as long.
        shares = [1 - float(torch.rand(1, dtype=torch.float64, generator=g, device="cpu")) for g in generators]
        sums = probabilities(logits, params).double().cumsum(-1)
        places = torch.tensor(shares, dtype=torch.float64, device=sums.device)[:, None] * sums[:, -1:]
        real, found = best.values.isfinite(), torch.searchsorted(sums, places)[:, 0]
    tokens: list[int] = torch.where(real, found, -1).tolist()
    return tokens


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, its log-probability before penalties, temperature and filters, and the likeliest tokens there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def logprob(logits: Tensor, token: int, top: int) -> TokenLogprob:
    """From the model's logits [vocab]."""
    logs = logits.float().log_softmax(-1)
    best = logs.topk(min(top, len(logs)))
    pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, float(logs[token]), pairs)


def mean_logprob(found: Sequence[TokenLogprob]) -> float:
    """By which texts of one prompt are compared, whatever their length."""
    return math.fsum(one.logprob for one in found) / max(1, len(found))


def generator_for(params: SamplingParams) -> torch.Generator | None:
    """The request's own random stream, so that its text does not depend on its neighbours."""
    if params.temperature == 0:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    elif params.seed < 2**32:
        generator.manual_seed(params.seed)
    else:  # of which torch reads the low half only
        digest = hashlib.blake2b(params.seed.to_bytes(8, "little"), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    return generator
