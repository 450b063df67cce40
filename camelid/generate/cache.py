"""Keys and values in pages, for the torch model: what `native/` does for its own.

Texts are never padded: a text's tokens lie in its own pages from 0 on, and a query sees exactly its own text, so a text
generated in a batch is the text generated alone, up to the order in which a product's terms are added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from camelid.kernels.decoder import PAGE
from camelid.model.config import LlamaConfig


class LayerKV:
    """One layer's pages [pages, PAGE, kv_heads, head_dim], seen through the texts its cache has selected."""

    def __init__(self, owner: KVCache) -> None:
        self.owner = owner
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [texts, kv_heads, new, head_dim] at each text's end; return all keys and values up to the longest."""
        owner = self.owner
        if self.keys is None or len(self.keys) < owner.pages:
            self.keys, self.values = (_grown(old, owner.pages, keys) for old in (self.keys, self.values))
        assert self.keys is not None
        assert self.values is not None
        where = owner.positions(keys.shape[2], keys.device)
        where = where[None] if where.dim() == 1 else where
        tables = owner.tables(keys.device)
        end = max(owner.starts) + keys.shape[2]
        pages, slots = places(where, tables)
        all_keys = store(self.keys, keys, pages, slots, tables)
        all_values = store(self.values, values, pages, slots, tables)
        return all_keys[:, :, :end], all_values[:, :, :end]


def places(where: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Page and place in it, each [texts, new], of positions [texts, new] in texts with the pages `tables` [texts,
    most]."""
    return tables.gather(1, where // PAGE), where % PAGE


def store(kept: Tensor, new: Tensor, pages: Tensor, slots: Tensor, tables: Tensor) -> Tensor:
    """Write keys or values [texts, kv_heads, new, head_dim] into `kept` [pages, PAGE, kv_heads, head_dim]; return all
    that the texts' pages hold, [texts, kv_heads, most * PAGE, head_dim]."""
    kept[pages, slots] = new.transpose(1, 2)
    return kept[tables].flatten(1, 2).transpose(1, 2)


def _grown(old: Tensor | None, pages: int, like: Tensor) -> Tensor:
    fresh = like.new_zeros(pages, PAGE, like.shape[1], like.shape[3])
    if old is not None:
        fresh[: len(old)] = old
    return fresh


class KVCache:
    """The cache of all layers. `select` says which texts the next forward pass is about."""

    def __init__(self, config: LlamaConfig) -> None:
        self.config, self.pages = config, 0
        self.starts: list[int] = []
        self._tables: list[list[int]] = []
        self._layers = [LayerKV(self) for _ in range(config.num_hidden_layers)]

    def reserve(self, pages: int, like: Tensor) -> None:
        """Make all pages now, in the dtype and on the device of `like`, and never others."""
        self.pages = pages
        c = self.config
        for layer in self._layers:
            shape = (pages, PAGE, c.kv_heads, c.head_size)
            layer.keys, layer.values = like.new_zeros(shape), like.new_zeros(shape)

    def select(self, starts: Sequence[int], tables: Sequence[Sequence[int]]) -> None:
        """Texts by how many tokens they have so far and which pages, with room for what comes next."""
        self.starts, self._tables = list(starts), [list(table) for table in tables]
        most = max(page for table in tables for page in table) + 1
        self.pages = self.pages if most <= self.pages else max(most, 2 * self.pages)

    def layers(self) -> list[LayerKV]:
        return self._layers

    def tables(self, device: torch.device) -> Tensor:
        """Page numbers, int64 [texts, longest]; shorter ones filled up with their first."""
        longest = max(map(len, self._tables))
        rows = [table + table[:1] * (longest - len(table)) for table in self._tables]
        return torch.tensor(rows, device=device)

    def positions(self, new: int, device: torch.device) -> Tensor:
        """Where the next `new` tokens go: [new] for one text, [texts, new] for several."""
        where = torch.tensor(self.starts, device=device)[:, None] + torch.arange(new, device=device)
        return where[0] if len(self.starts) == 1 else where

    def mask(self, new: int, device: torch.device) -> Tensor | None:
        """bool [texts, 1, new, longest]; None when plain causal attention or no mask at all is right."""
        if len(self.starts) == 1 and (new == 1 or self.starts[0] == 0):
            return None
        where = self.positions(new, device)
        where = where[None] if where.dim() == 1 else where
        keys = torch.arange(max(self.starts) + new, device=device)
        return (keys <= where[:, :, None])[:, None]

    def advance(self, new: int) -> None:
        """Count `new` more tokens in every selected text."""
        self.starts = [start + new for start in self.starts]
