"""How the next token is chosen: temperature, then min-p, top-k, top-p. Temperature 0 is the argmax."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from camelid.errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """One request's wishes. Raises InputError for a value out of range.

    temperature 0 is greedy. top_k 0 and top_p 1 are off. min_p drops tokens less likely than min_p times the
    likeliest. `max_length` counts prompt and new tokens together, `max_new_tokens` new ones; both may be given
    and the first one met ends the text. `stop` strings end it too and are left out of the text. `adapter` names one of
    the model's adapters; None is the one that is active, if any.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = field(default=())
    ignore_eos: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0, 100)
        _within("top_p", self.top_p, 0, 1)
        _within("min_p", self.min_p, 0, 1)
        for name in ("max_new_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 (off) or more, not {self.top_k}")
        if self.top_p == 0:
            raise InputError("top_p must be above 0: at 0 no token is left")
        if any(not s for s in self.stop):
            raise InputError("a stop string is empty: it would end every text at once")

    def budget(self, prompt_tokens: int, default: int = 256) -> tuple[int, str]:
        """How many tokens may follow a prompt, and the name of the limit that says so."""
        limits = []
        if self.max_new_tokens is not None:
            limits.append((self.max_new_tokens, "max_new_tokens"))
        if self.max_length is not None:
            limits.append((self.max_length - prompt_tokens, "max_length"))
        return min(limits, default=(default, "max_new_tokens"))


def _within(name: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
        raise InputError(f"{name} must be between {low} and {high}, not {value!r}")


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution sampled from: logits [vocab] -> float32 [vocab], summing to 1, after all filters."""
    scores = logits.float() / params.temperature
    if params.min_p > 0:
        scores = scores.masked_fill(scores < scores.max() + math.log(params.min_p), -torch.inf)
    if 0 < params.top_k < scores.numel():
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[-1], -torch.inf)
    if params.top_p < 1:
        ordered, order = scores.softmax(-1).sort(descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= params.top_p  # mass before the token already reaches top_p
        scores = scores.index_fill(0, order[beyond], -torch.inf)
    return scores.softmax(-1)


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator | None) -> int:
    """Choose one token from logits [vocab]."""
    if params.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(probabilities(logits, params).cpu(), 1, generator=generator))


def generator_for(params: SamplingParams) -> torch.Generator | None:
    """The request's own random stream, so that its text does not depend on its neighbours."""
    if params.temperature == 0:
        return None
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator
