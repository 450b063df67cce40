"""Keys and values in pages, for the torch model: what `native/` does for its own.

Texts are never padded: a text's tokens lie in its own pages from 0 on, and a query sees exactly its own text, so a text
generated in a batch is the text generated alone, up to the order in which a product's terms are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import proxy

import torch
from torch import Tensor

from camelid.kernels.attention import Mask, attention
from camelid.kernels.decoder import PAGE
from camelid.kernels.packed import as_bytes
from camelid.model.config import LlamaConfig


@dataclass(frozen=True)
class Kept:
    """Keys or values in pages [pages, PAGE, kv_heads, head_dim]; as bytes with what one is `worth`, float32 [pages,
    PAGE, kv_heads, 1]."""

    data: Tensor
    worth: Tensor | None = None

    @classmethod
    def room(cls, pages: int, heads: int, size: int, like: Tensor, integers: bool) -> Kept:
        """Zeros on the device of `like` and in its dtype, or in int8."""
        if not integers:
            return cls(like.new_zeros(pages, PAGE, heads, size))
        bytes_ = like.new_zeros(pages, PAGE, heads, size, dtype=torch.int8)
        return cls(bytes_, like.new_zeros(pages, PAGE, heads, 1, dtype=torch.float32))

    def grown(self, pages: int) -> Kept:
        """The same with more pages."""
        _, _, heads, size = self.data.shape
        more = Kept.room(pages, heads, size, self.data, self.worth is not None)
        more.data[: len(self.data)] = self.data
        if more.worth is not None and self.worth is not None:
            more.worth[: len(self.data)] = self.worth
        return more

    def store(self, new: Tensor, pages: Tensor, slots: Tensor, tables: Tensor) -> Tensor:
        """Write keys or values [texts, kv_heads, new, head_dim] where `places` says; return all that the texts' pages
        hold, [texts, kv_heads, most * PAGE, head_dim], in the dtype of `new`."""
        self.write(new.transpose(1, 2), pages, slots)
        found = self.data[tables]
        if self.worth is not None:
            found = (found * self.worth[tables]).to(new.dtype)
        return found.flatten(1, 2).transpose(1, 2)

    def write(self, new: Tensor, pages: Tensor, slots: Tensor) -> None:
        """Put keys or values [..., kv_heads, head_dim] into these places [...]."""
        if self.worth is None:
            self.data[pages, slots] = new
        else:
            self.data[pages, slots], self.worth[pages, slots] = as_bytes(new)


class LayerKV:
    """One layer's pages, seen through the texts its cache has selected."""

    def __init__(self, owner: KVCache) -> None:
        self.owner: KVCache = proxy(owner)  # else only a search for circles would free the pages
        self.keys: Kept | None = None
        self.values: Kept | None = None

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> Tensor:
        """Store what is new, and look at everything up to the longest text's end."""
        return attention(q, *self.append(keys, values), mask)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [texts, kv_heads, new, head_dim] at each text's end; return all keys and values up to the longest."""
        owner = self.owner
        if self.keys is None:
            self.make(owner.pages, keys)
        kept_keys, kept_values = self._grown()
        where = owner.positions(keys.shape[2], keys.device)
        where = where[None] if where.dim() == 1 else where
        tables = owner.tables(keys.device)
        end = max(owner.starts) + keys.shape[2]
        pages, slots = places(where, tables)
        all_keys = kept_keys.store(keys, pages, slots, tables)
        all_values = kept_values.store(values, pages, slots, tables)
        ends = [start + keys.shape[2] for start in owner.starts]
        if min(ends) < end:
            own = torch.tensor(ends, device=keys.device)
            all_keys, all_values = only_own(all_keys, own), only_own(all_values, own)
        return all_keys[:, :, :end], all_values[:, :, :end]

    def copy(self, source: list[int], target: list[int]) -> None:
        for kept in self._grown():
            kept.data[target] = kept.data[source]
            if kept.worth is not None:
                kept.worth[target] = kept.worth[source]

    def _grown(self) -> tuple[Kept, Kept]:
        """Keys and values, with as many pages as the cache has."""
        keys, values = self.made
        if len(keys.data) < self.owner.pages:
            self.keys, self.values = keys.grown(self.owner.pages), values.grown(self.owner.pages)
        return self.made

    @property
    def made(self) -> tuple[Kept, Kept]:
        """Keys and values, of which there are some."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def in_memory(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """All pages of keys and of values and, where they are bytes, what one is worth: as kernels/gpu takes them."""
        keys, values = self.made
        if keys.worth is None or values.worth is None:
            return (keys.data, values.data), None
        return (keys.data, values.data), (keys.worth, values.worth)

    def make(self, pages: int, like: Tensor) -> None:
        """Empty pages, in the dtype and on the device of `like`."""
        config, integers = self.owner.config, self.owner.integers
        self.keys, self.values = (Kept.room(pages, config.kv_heads, config.head_size, like, integers) for _ in range(2))


def only_own(kept: Tensor, ends: Tensor) -> Tensor:
    """Keys or values [texts, kv_heads, most, head_dim], zero from each text's end [texts] on. What another text left
    there gets no weight, but a NaN times nothing is a NaN."""
    beyond = torch.arange(kept.shape[2], device=kept.device) >= ends[:, None]
    return kept.masked_fill_(beyond[:, None, :, None], 0)


def places(where: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Page and place in it, each [texts, new], of positions [texts, new] in texts with the pages `tables` [texts,
    most]."""
    return tables.gather(1, where // PAGE), where % PAGE


class KVCache:
    """The cache of all layers, in the dtype of what is kept or, with `integers`, in int8. `select` says which texts the
    next forward pass is about."""

    def __init__(self, config: LlamaConfig, integers: bool = False) -> None:
        self.config, self.integers, self.pages = config, integers, 0
        self.most = 1 << 62  # pages that will ever be asked for
        self.starts: list[int] = []
        self._tables: list[list[int]] = []
        self._layers = [LayerKV(self) for _ in range(config.num_hidden_layers)]

    def reserve(self, pages: int, like: Tensor) -> None:
        """Make all pages now, in the dtype and on the device of `like`, and never others."""
        self.pages = pages
        for layer in self._layers:
            layer.make(pages, like)

    def select(self, starts: Sequence[int], tables: Sequence[Sequence[int]]) -> None:
        """Texts by how many tokens they have so far and which pages, with room for what comes next."""
        self.starts, self._tables = list(starts), [list(table) for table in tables]
        most = max(page for table in tables for page in table) + 1
        self.pages = self.pages if most <= self.pages else max(most, min(2 * self.pages, self.most))

    def copy(self, pages: Sequence[tuple[int, int]]) -> None:
        """What each first page holds, into each second one."""
        source, target = map(list, zip(*pages, strict=True))
        self.pages = max(self.pages, max(target) + 1)
        for layer in self._layers:
            layer.copy(source, target)

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
