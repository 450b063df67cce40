"""Cross-entropy of the next token, as a sum: the loop divides by the supervised tokens of the whole global batch.

Dividing per micro-batch instead would weigh tokens by how many neighbours happen to be supervised (transformers
issue 34191); a test holds accumulation equal to one big batch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from camelid.model.llama import Llama
from camelid.tokens.batch import IGNORE, Batch


def loss_sum(model: Llama, batch: Batch) -> Tensor:
    """Sum over supervised positions of -log p(label), float32 scalar. Only those positions meet the vocabulary."""
    hidden = model.hidden(batch.input_ids, document_ids=None if batch.one_document else batch.document_ids)
    labels, states = batch.labels.flatten(), hidden.flatten(0, 1)
    kept = labels != IGNORE
    if not bool(kept.all()):
        labels, states = labels[kept], states[kept]
    return F.cross_entropy(model.lm_head(states).float(), labels, reduction="sum")
