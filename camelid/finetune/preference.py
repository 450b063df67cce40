"""Losses that compare answers. Each sees the log-probabilities of whole answers, never the text.

A batch's documents come in twos: the chosen and the rejected answer of a pair; for KTO, an answer and the same question
with another row's answer, which only measures how far the model has moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from camelid.kernels.cross_entropy import linear_log_probs
from camelid.model.llama import Llama
from camelid.recipe import FinetuneSection
from camelid.tokens.batch import IGNORE, Batch
from camelid.train.loss import supervised_states
from camelid.train.parallel import Ranks, release, total

REFERENCE, GOOD, BASELINE = 0, 1, 2  # what a document's facts are
FACTS = 3


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of pairs of documents [pairs, 2]: `sums` of an answer's tokens, their `means`, the `reference`
    model's sums, and the facts [pairs, 2, FACTS]."""

    sums: Tensor
    means: Tensor
    reference: Tensor
    facts: Tensor


def answer_log_probs(model: Llama, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sums of the supervised tokens' log-probabilities at a temperature, and their counts, of every document: [rows,
    documents]."""
    states, labels, places = supervised_states(model, batch)
    found = linear_log_probs(states / temperature if temperature != 1 else states, model.lm_head.weight, labels)
    rows = places // batch.labels.shape[1]
    width = int(batch.document_ids.max()) + 1
    slot = rows * width + batch.document_ids.flatten()[places]
    empty = torch.zeros(len(batch.labels) * width, dtype=found.dtype, device=found.device)
    sums = empty.index_add(0, slot, found).view(-1, width)
    counts = empty.index_add(0, slot, torch.ones_like(found)).view(-1, width)
    return sums, counts


def scores(model: Llama, batch: Batch) -> Scores:
    """The batch's pairs."""
    sums, counts = answer_log_probs(model, batch)
    assert batch.facts is not None
    facts = batch.facts[:, : sums.shape[1]]
    rows = len(sums)
    there = counts.view(rows, -1, 2)[..., 0] > 0
    facts = facts.reshape(rows, -1, 2, FACTS)[there]
    sums, counts = (t.view(rows, -1, 2)[there] for t in (sums, counts))
    return Scores(sums, sums / counts, facts[..., REFERENCE].to(sums.dtype), facts)


class Preference:
    """DPO (arXiv:2305.18290), ORPO (2403.07691), SimPO (2405.14734) or KTO (2402.01306) as an `Objective`."""

    told: Mapping[str, float] = {}
    level = True

    def __init__(self, settings: FinetuneSection, micro_rows: int) -> None:
        self.settings, self.micro_rows = settings, micro_rows

    def count(self, batch: Batch) -> int:
        """Pairs, or KTO's verdicts: every second document."""
        return int((batch.document_ids.amax(dim=1) + 1).sum()) // 2

    def prepare(self, model: Llama, batch: Batch, who: Ranks) -> Batch:
        """KTO's baseline z, from the whole global batch: the mean of log pi/ref of the mismatched answers, at least 0.

        The paper estimates it per micro-batch; of the whole batch, it does not depend on how the batch is cut.
        """
        if self.settings.method != "kto" or batch.facts is None:
            return batch
        moved = torch.zeros(2, dtype=torch.float64, device=model.device)
        with torch.no_grad():
            for first in range(0, len(batch.input_ids), self.micro_rows):
                found = scores(model, batch.part(first, first + self.micro_rows).to(model.device))
                moved[0] += (found.sums - found.reference)[:, 1].sum()
                moved[1] += len(found.sums)
        release(model)
        moved = total(who, moved)
        facts = batch.facts.clone()
        facts[..., BASELINE] = max(0.0, float(moved[0] / moved[1]))
        # The mismatched answers, every second document, have done their part: nothing is learned from them.
        labels = batch.labels.masked_fill(batch.document_ids % 2 == 1, IGNORE)
        return replace(batch, labels=labels, facts=facts)

    def __call__(self, model: Llama, batch: Batch, z_loss: float) -> Tensor:
        return self.losses(scores(model, batch)).sum()

    def losses(self, found: Scores) -> Tensor:
        """The loss of each pair, or verdict: [pairs]."""
        s = self.settings
        if s.method == "dpo":
            return -F.logsigmoid(margins(found, s))
        if s.method == "simpo":
            return -F.logsigmoid(margins(found, s) - s.margin)
        if s.method == "orpo":  # the chosen answer's own loss, and the log odds ratio
            return -found.means[:, 0] - s.beta * F.logsigmoid(margins(found, s))
        reward = s.beta * (found.sums - found.reference)[:, 0]
        baseline, good = s.beta * found.facts[:, 0, BASELINE], found.facts[:, 0, GOOD] > 0
        kept = s.desirable * torch.sigmoid(baseline - reward)
        left = s.undesirable * torch.sigmoid(reward - baseline)
        return torch.where(good, kept, left)


def margins(found: Scores, settings: FinetuneSection) -> Tensor:
    """By how much a pair's chosen answer is preferred, in the terms of the method: [pairs]. Of KTO, each reward with
    the sign of its verdict."""
    s = settings
    if s.method == "orpo":
        odds = found.means - torch.log1p(-found.means.exp().clamp(max=1 - 1e-7))
        return odds[:, 0] - odds[:, 1]
    if s.method == "simpo":
        return s.beta * (found.means[:, 0] - found.means[:, 1])
    moved = s.beta * (found.sums - found.reference)
    if s.method == "kto":
        return moved[:, 0] * torch.where(found.facts[:, 0, GOOD] > 0, 1.0, -1.0)
    return moved[:, 0] - moved[:, 1]


def measured(model: Llama, batches: list[Batch], objective: Preference) -> dict[str, float]:
    """Mean loss, margin and the share of margins above 0 over prepared batches, without learning."""
    loss = margin = better = count = 0.0
    with torch.no_grad():
        for batch in batches:
            found = scores(model, batch.to(model.device))
            apart = margins(found, objective.settings)
            loss += float(objective.losses(found).sum())
            margin += float(apart.sum())
            better += float((apart > 0).sum())
            count += len(apart)
    named = {"loss": loss / count, "margin": margin / count, "accuracy": better / count}
    return {name: value for name, value in named.items() if math.isfinite(value)}
