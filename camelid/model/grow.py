"""Rows for tokens that a model did not know when it was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from camelid.model.llama import Llama


@torch.no_grad()
def grow_embeddings(model: Llama, first: int, spelled: Sequence[Sequence[int]]) -> None:
    """Give ids `first`, `first` + 1, … the mean of the rows of the ids that spelled them, in both tables.

    The rows below `first` stay as they are, so the scores of old tokens do.
    """
    size = max(model.config.vocab_size, first + len(spelled))
    model.embed_tokens.weight = nn.Parameter(_grown(model.embed_tokens.weight, first, spelled, size))
    model.embed_tokens.num_embeddings = size
    if not model.config.tie_word_embeddings:
        model.lm_head.weight = nn.Parameter(_grown(model.lm_head.weight, first, spelled, size))
    model.lm_head.out_features = size
    model.head_bytes = model.head_scale = None
    model.config = replace(model.config, vocab_size=size)
    model.tie()


def _grown(table: Tensor, first: int, spelled: Sequence[Sequence[int]], size: int) -> Tensor:
    grown = torch.zeros(size, table.shape[1], dtype=table.dtype, device=table.device)
    grown[: len(table)] = table
    for row, ids in enumerate(spelled, first):
        grown[row] = table[list(ids)].float().mean(0).to(table.dtype)
    return grown
