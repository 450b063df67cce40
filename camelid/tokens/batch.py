"""Batches of packed sequences for the one training loop.

Pre-training cuts the token stream into windows of sequence_length + 1; the last token of a window is the first of
the next, so each is predicted exactly once an epoch. A token never attends to another document.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from camelid.artifact import read_manifest
from camelid.errors import InputError
from camelid.tokens.order import item_at
from camelid.tokens.write import INDEX, STARTS, TOKENS

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """input_ids, labels (already shifted; IGNORE where nothing is learned) and document_ids: int64 [rows, seq].

    `one_document` is True when no row holds two documents, so plain causal attention is right.
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor
    one_document: bool

    def supervised(self) -> int:
        """How many positions have a label: the divisor of the loss."""
        return int((self.labels != IGNORE).sum())


class Source(Protocol):
    """What the training loop asks of data. Position counts sequences over the whole run."""

    def __len__(self) -> int:
        """Sequences in one epoch."""
        ...

    def batch(self, position: int, rows: int) -> Batch: ...


class PackedTokens:
    """Windows over a tokens folder, in the order of `tokens/order.py`. Raises InputError when it is not one."""

    def __init__(self, folder: str | Path, sequence_length: int, seed: int) -> None:
        self.folder, self.sequence_length, self.seed = Path(folder), sequence_length, seed
        if read_manifest(self.folder)["kind"] != "tokens":
            raise InputError(f"data.tokens: {folder} is not a tokens folder: make one with `camelid tokens build`")
        self.index = json.loads((self.folder / INDEX).read_text())
        self.data = np.memmap(self.folder / TOKENS, dtype=self.index["dtype"], mode="r")
        self.starts = np.load(self.folder / STARTS)
        if len(self) < 1:
            raise InputError(
                f"{folder} holds {len(self.data)} tokens, not one window of {sequence_length + 1}: "
                "lower train.sequence_length or add text"
            )

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.sequence_length

    def batch(self, position: int, rows: int) -> Batch:
        """The `rows` sequences from `position` on."""
        items = [item_at(p, len(self), self.seed) for p in range(position, position + rows)]
        windows = [self._window(item) for item in items]
        tokens = torch.from_numpy(np.stack([w[0] for w in windows]))
        documents = torch.from_numpy(np.stack([w[1] for w in windows]))
        labels = tokens[:, 1:].masked_fill(documents[:, 1:] != documents[:, :-1], IGNORE)
        documents = documents[:, :-1]
        return Batch(tokens[:, :-1], labels, documents, bool((documents[:, 0] == documents[:, -1]).all()))

    def _window(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        start = item * self.sequence_length
        where = np.arange(start, start + self.sequence_length + 1)
        tokens = self.data[where[0] : where[-1] + 1].astype(np.int64)
        return tokens, np.searchsorted(self.starts, where, side="right")
