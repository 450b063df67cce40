"""Cross-entropy of the next token, as a sum: the loop divides by the supervised tokens of the whole global batch.

Dividing per micro-batch instead would weigh tokens by how many neighbours happen to be supervised (transformers
issue 34191); a test holds accumulation equal to one big batch.
"""

from __future__ import annotations

from torch import Tensor

from camelid.kernels.cross_entropy import linear_cross_entropy
from camelid.model.llama import Llama
from camelid.tokens.batch import IGNORE, Batch


def loss_sum(model: Llama, batch: Batch, z_loss: float = 0.0) -> Tensor:
    """Sum over supervised positions of -log p(label), float32 scalar. Only those positions meet the vocabulary."""
    hidden = model.hidden(batch.input_ids, document_ids=None if batch.one_document else batch.document_ids)
    labels, states = batch.labels.flatten(), hidden.flatten(0, 1)
    kept = labels != IGNORE
    if not bool(kept.all()):
        labels, states = labels[kept], states[kept]
    return linear_cross_entropy(states, model.lm_head.weight, labels, z_loss)
