"""What a run makes smaller. An objective gives a sum and its count: the step divides one by the other over the whole
global batch.

Dividing per micro-batch instead would weigh tokens by how many neighbours happen to be supervised (transformers
issue 34191); a test holds accumulation equal to one big batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from camelid.kernels.cross_entropy import linear_cross_entropy
from camelid.model.llama import Llama
from camelid.model.rope import rotation
from camelid.tokens.batch import IGNORE, Batch
from camelid.train.parallel import Ranks, total_of_rows


class Objective(Protocol):
    """A loss over batches."""

    @property
    def told(self) -> Mapping[str, float]:
        """Figures of the last batch beside its loss."""
        ...

    @property
    def level(self) -> bool:
        """Whether the loss has a level that a spike would rise above."""
        ...

    def count(self, batch: Batch) -> int:
        """What the loss is the mean over, in this batch: supervised tokens, or pairs."""
        ...

    def prepare(self, model: Llama, batch: Batch, who: Ranks) -> Batch:
        """The batch with what must be known of all of it before it is counted and its parts are learned from."""
        ...

    def __call__(self, model: Llama, batch: Batch, z_loss: float) -> Tensor:
        """The sum of the loss over a part of a batch, a scalar."""
        ...


class NextToken:
    """Cross-entropy of the next token."""

    told: Mapping[str, float] = {}
    level = True

    def count(self, batch: Batch) -> int:
        return batch.supervised()

    def prepare(self, model: Llama, batch: Batch, who: Ranks) -> Batch:
        return batch

    def __call__(self, model: Llama, batch: Batch, z_loss: float) -> Tensor:
        return loss_sum(model, batch, z_loss)


def loss_sum(model: Llama, batch: Batch, z_loss: float = 0.0) -> Tensor:
    """Sum over supervised positions of -log p(label), float32 scalar. Only those positions meet the vocabulary."""
    states, labels, _ = supervised_states(model, batch)
    return linear_cross_entropy(states, model.head, labels, z_loss)


def mean_loss(model: Llama, batches: Iterable[Batch], who: Ranks) -> float:
    """The mean over the supervised tokens of batches, nats: the same on every rank, which all take part."""
    losses, count = [], 0
    for batch in batches:
        losses.append(loss_sum(model, who.stretch(batch).to(model.device)).double())
        count += batch.supervised()
    return float(total_of_rows(who, torch.stack(losses).sum())) / count


def supervised_states(model: Llama, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The last states [supervised, hidden], labels and places (in the flattened batch) of the supervised positions."""
    documents = None if batch.one_document else batch.document_ids
    length, whole = batch.input_ids.shape[1], batch.document_ids.shape[1]
    turn = None
    if length < whole:
        turn = rotation(model.config, torch.arange(length, device=batch.input_ids.device) + batch.begins, whole)
    hidden = model.hidden(batch.input_ids, document_ids=documents, turn=turn)
    labels, states = batch.labels.flatten(), hidden.flatten(0, 1)
    kept = labels != IGNORE
    places = kept.nonzero().squeeze(1)
    if len(places) < len(labels):
        labels, states = labels[places], states[places]
    return states, labels, places
