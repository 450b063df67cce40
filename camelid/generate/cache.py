"""Keys and values of the tokens so far, for rows of different lengths.

Each row owns one slot of a buffer [rows, kv_heads, capacity, head_dim] per layer that grows by doubling. Rows are
never padded: a row's tokens start at 0 and a query sees exactly its own row's length, so a text generated in a
batch is the text generated alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from camelid.model.config import LlamaConfig


class LayerKV:
    """One layer's keys and values, seen through the rows its cache has selected."""

    def __init__(self, owner: KVCache) -> None:
        self.owner = owner
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [selected, kv_heads, new, head_dim] at each row's end; return all keys and values up to the longest."""
        owner, new = self.owner, keys.shape[2]
        self._reserve(keys)
        assert self.keys is not None
        assert self.values is not None
        end = max(owner.lengths[row] for row in owner.rows) + new
        if len(owner.rows) == 1:
            row, start = owner.rows[0], owner.lengths[owner.rows[0]]
            self.keys[row, :, start:end] = keys[0]
            self.values[row, :, start:end] = values[0]
            return self.keys[row : row + 1, :, :end], self.values[row : row + 1, :, :end]
        rows = torch.tensor(owner.rows, device=keys.device)
        where = owner.positions(new, keys.device)
        self.keys[rows[:, None], :, where] = keys.transpose(1, 2)
        self.values[rows[:, None], :, where] = values.transpose(1, 2)
        if owner.rows == list(range(len(owner.lengths))):
            return self.keys[:, :, :end], self.values[:, :, :end]
        return self.keys[rows, :, :end], self.values[rows, :, :end]

    def _reserve(self, like: Tensor) -> None:
        owner = self.owner
        needed = max(owner.lengths[row] for row in owner.rows) + like.shape[2]
        have = 0 if self.keys is None else self.keys.shape[2]
        if needed <= have:
            return
        capacity = max(needed, 2 * have, 64)
        shape = (len(owner.lengths), like.shape[1], capacity, like.shape[3])
        for name in ("keys", "values"):
            old, fresh = getattr(self, name), like.new_zeros(shape)
            if old is not None:
                fresh[:, :, :have] = old
            setattr(self, name, fresh)


class KVCache:
    """The cache of all layers for `rows` texts. `rows` selects which of them the next forward pass is about."""

    def __init__(self, config: LlamaConfig, rows: int = 1) -> None:
        self.lengths = [0] * rows
        self.rows = list(range(rows))
        self._layers = [LayerKV(self) for _ in range(config.num_hidden_layers)]

    def layers(self) -> Sequence[LayerKV]:
        return self._layers

    def positions(self, new: int, device: torch.device) -> Tensor:
        """Where the next `new` tokens go: [new] for one row, [selected, new] for several."""
        starts = torch.tensor([self.lengths[row] for row in self.rows], device=device)
        where = starts[:, None] + torch.arange(new, device=device)
        return where[0] if len(self.rows) == 1 else where

    def mask(self, new: int, device: torch.device) -> Tensor | None:
        """bool [selected, 1, new, longest]; None when plain causal attention or no mask at all is right."""
        if len(self.rows) == 1 and (new == 1 or self.lengths[self.rows[0]] == 0):
            return None
        where = self.positions(new, device)
        where = where[None] if where.dim() == 1 else where
        keys = torch.arange(max(self.lengths[row] for row in self.rows) + new, device=device)
        return (keys <= where[:, :, None])[:, None]

    def advance(self, new: int) -> None:
        """Count `new` more tokens in every selected row."""
        for row in self.rows:
            self.lengths[row] += new

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens of every row."""
        self.lengths = [min(n, length) for n in self.lengths]
