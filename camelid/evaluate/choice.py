"""Multiple choice by log-likelihood: which of the answers does the model find likeliest after the question?

A question is read once for all its choices: they stand side by side behind it, each at the question's end, and see the
question and themselves only. Questions share a row the same way. Both accuracies are always given: by log-likelihood,
and by log-likelihood per character of the answer, lm-eval's `acc` and `acc_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camelid.errors import InputError
from camelid.evaluate.opened import check_finite, measured_in
from camelid.evaluate.templates import read_rows, read_template
from camelid.kernels.attention import Mask, attention
from camelid.kernels.cross_entropy import linear_log_probs
from camelid.model.llama import Llama
from camelid.report.progress import progress
from camelid.tokenizer.tokenizer import Tokenizer

# Tokens that are read together, unless one question needs more. What a question may not see is computed all the same.
ROW = {"cpu": 256, "cuda": 512}


@dataclass(frozen=True)
class Question:
    """A prompt, the answers to choose from as they are written after it, and which of them is right."""

    prompt: str
    answers: list[str]
    right: int


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt, and of every answer after it."""

    prompt: list[int]
    answers: list[list[int]]

    def size(self) -> int:
        return len(self.prompt) + sum(len(a) for a in self.answers)


def read_task(name: str) -> dict[str, str]:
    """A multiple-choice task's template: see `templates.read_template`."""
    return read_template(name, ("prompt", "answer", "choices", "labels", "key"))


def questions(path: Path, task: Mapping[str, str]) -> list[Question]:
    """The questions of a .jsonl file. Raises InputError naming the line and the field, an answer key above all."""
    wanted = f"a question with {task['choices']}, {task['labels']} and the answer key {task['key']}"
    return read_rows(path, lambda row: _question(row, task), wanted)


def _question(row: Mapping[str, Any], task: Mapping[str, str]) -> Question:
    def at(place: str) -> Any:
        value: Any = row
        for part in place.split("."):
            value = value[part]
        return value

    if not isinstance(at(task["choices"]), list) or not isinstance(at(task["labels"]), list):
        raise TypeError("choices and labels must be lists")
    choices, labels, key = [str(c) for c in at(task["choices"])], [str(x) for x in at(task["labels"])], at(task["key"])
    right = labels.index(str(key))
    lettered = "\n".join(f"{label}. {choice}" for label, choice in zip(labels, choices, strict=True))
    prompt = task["prompt"].format(**{**row, "lettered": lettered})
    answers = [task["answer"].format(choice=choice, label=label) for choice, label in zip(choices, labels, strict=True)]
    return Question(prompt, answers, right)


def encode(question: Question, tokenizer: Tokenizer, before: str = "") -> Encoded:
    """Prompt and answer are cut into tokens as one text, as they would be read; where a token spans the two, it belongs
    to the answer and is scored with it."""
    prompt = tokenizer.encode_prompt(before + question.prompt, parse_special=False)
    whole = [tokenizer.encode_prompt(before + question.prompt + a, parse_special=False) for a in question.answers]
    same = min([len(prompt), *(_common(prompt, ids) for ids in whole)])
    if not same:
        raise InputError(
            f"the prompt {question.prompt[:60]!r} has no token of its own: nothing would predict the answer"
        )
    if any(len(ids) <= same for ids in whole):
        raise InputError(f"an answer to {question.prompt[:60]!r} is empty: there is nothing to score")
    return Encoded(prompt[:same], [ids[same:] for ids in whole])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class _Branches:
    """Several questions in one row, as a model's cache that keeps nothing: where a token stands, and what it sees."""

    def __init__(self, encoded: Sequence[Encoded], layers: int) -> None:
        self.ids: list[int] = []
        self.scored: list[tuple[int, int, int]] = []  # (place that predicts, token, answer's number)
        stands: list[int] = []
        size = sum(e.size() for e in encoded)
        self.seen = torch.zeros(size, size, dtype=torch.bool)
        number = 0
        for e in encoded:
            first, last = len(self.ids), len(self.ids) + len(e.prompt)
            self.ids += e.prompt
            stands += range(len(e.prompt))
            self.seen[first:last, first:last] = _below(len(e.prompt))
            for answer in e.answers:
                start, end = len(self.ids), len(self.ids) + len(answer)
                self.ids += answer
                stands += range(len(e.prompt), len(e.prompt) + len(answer))
                self.seen[start:end, first:last] = True
                self.seen[start:end, start:end] = _below(len(answer))
                places = [last - 1, *range(start, end - 1)]
                self.scored += [(place, token, number) for place, token in zip(places, answer, strict=True)]
                number += 1
        self.count, self._stands, self._layers = number, torch.tensor(stands), [self] * layers

    def layers(self) -> Sequence[_Branches]:
        return self._layers

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> Tensor:
        return attention(q, keys, values, mask)

    def positions(self, new: int, device: torch.device) -> Tensor:
        return self._stands.to(device)

    def mask(self, new: int, device: torch.device) -> Tensor:
        return self.seen[None, None].to(device)

    def advance(self, new: int) -> None:
        pass


def _below(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


@dataclass(frozen=True)
class Read:
    """What a model made of questions in one row: the state [tokens, hidden] that predicts each answer token, that
    token, and which answer of how many it belongs to."""

    states: Tensor
    tokens: Tensor
    numbers: Tensor
    answers: int

    def sums(self, values: Tensor) -> list[float]:
        """What the tokens of each answer add up to."""
        empty = torch.zeros(self.answers, dtype=values.dtype, device=values.device)
        found: list[float] = empty.index_add(0, self.numbers, values).tolist()
        return found


@torch.inference_mode()
def read_row(model: Llama, encoded: Sequence[Encoded]) -> Read:
    """Read every answer of every question once, in one row."""
    row = _Branches(encoded, model.config.num_hidden_layers)
    hidden = model.hidden(torch.tensor([row.ids], device=model.device), cache=row)[0]
    places, tokens, numbers = (torch.tensor(x, device=model.device) for x in zip(*row.scored, strict=True))
    return Read(hidden[places], tokens, numbers, row.count)


@torch.inference_mode()
def log_likelihoods(model: Llama, encoded: Sequence[Encoded]) -> list[list[float]]:
    """log p(answer | prompt) of every answer of every question, read in one row."""
    read = read_row(model, encoded)
    ends = iter(read.sums(linear_log_probs(read.states, model.lm_head.weight, read.tokens)))
    return [[next(ends) for _ in e.answers] for e in encoded]


def rows(encoded: Sequence[Encoded], device: torch.device) -> Iterator[list[int]]:
    """Numbers of questions that are read together on `device`."""
    most = ROW.get(device.type, 256)
    row: list[int] = []
    filled = 0
    for n, e in enumerate(encoded):
        if row and filled + e.size() > most:
            yield row
            row, filled = [], 0
        row.append(n)
        filled += e.size()
    yield row


def choice(
    model: Llama, tokenizer: Tokenizer, asked: Sequence[Question], *, shots: Sequence[Question] = (), task: str = "",
    quiet: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Returns accuracy, accuracy_normalized, their standard errors, questions, `answers` (each choice's log-likelihood
    and what was picked) and the protocol, which names the `task`. `shots` are solved questions that stand before
    each one."""
    before = "".join(f"{q.prompt}{q.answers[q.right]}\n\n" for q in shots)
    encoded = [encode(q, tokenizer, before) for q in asked]
    longest = max(len(e.prompt) + max(len(a) for a in e.answers) for e in encoded)
    if longest > model.config.max_position_embeddings:
        raise InputError(
            f"a question needs {longest} tokens, the model takes {model.config.max_position_embeddings}: fewer --shots"
        )
    found: list[list[float]] = []
    with progress("choice", len(asked), quiet) as advance:
        for row in rows(encoded, model.device):
            found += log_likelihoods(model, [encoded[n] for n in row])
            advance(len(found))
    check_finite((x for s in found for x in s), "an answer")
    picked = [max(range(len(s)), key=s.__getitem__) for s in found]
    even = [
        [x / max(1, len(a.strip())) for x, a in zip(s, q.answers, strict=True)]
        for s, q in zip(found, asked, strict=True)
    ]
    picked_even = [max(range(len(s)), key=s.__getitem__) for s in even]
    right = [p == q.right for p, q in zip(picked, asked, strict=True)]
    right_even = [p == q.right for p, q in zip(picked_even, asked, strict=True)]
    bos = "BOS as the tokenizer adds it" if tokenizer.encode("")[:1] else "no BOS"
    return {
        "accuracy": _mean(right), "accuracy_normalized": _mean(right_even),
        "standard_error": _error(right), "standard_error_normalized": _error(right_even),
        "questions": len(asked),
        "answers": [
            {"log_likelihoods": s, "picked": p, "picked_normalized": e, "right": q.right}
            for s, p, e, q in zip(found, picked, picked_even, asked, strict=True)
        ],
        "protocol": (
            f"{f'task {task}, ' if task else ''}likeliest of the choices over {len(asked)} questions, "
            f"{len(shots)} shots, sum of log p and the same per character, {bos}, "
            f"{measured_in(model, tokenizer)}"
        ),
    }  # fmt: skip


def _mean(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def _error(right: Sequence[bool]) -> float:
    """Standard error of a share."""
    p = _mean(right)
    return math.sqrt(p * (1 - p) / max(1, len(right) - 1))
