"""One token for each of several texts, as a recorded CUDA graph: a thousand small kernels started by one call.

A graph has fixed shapes, so the number of texts and of their pages are rounded up to powers of two and one graph is
recorded for each pair when it is first met. Texts that fill up the number write into a page of their own and are
thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camelid.generate.cache import KVCache, LayerKV, only_own, places
from camelid.kernels.attention import Mask, attention
from camelid.kernels.decoder import PAGE
from camelid.kernels.device import runs_triton
from camelid.model.attention import LayerCache
from camelid.model.llama import Llama
from camelid.model.rope import Rotation, rotation

FEWEST_PAGES = 8


class Graphs:
    """Steps of single tokens over the pages of a reserved KVCache, of which page `scrap` belongs to no text."""

    def __init__(self, model: Llama, cache: KVCache, scrap: int) -> None:
        self._model, self._cache, self._scrap = model, cache, scrap
        length = scrap * PAGE + 1
        self._turns = rotation(model.config, torch.arange(length, device=model.device))
        self._recorded: dict[tuple[str | None, int, int], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, ids: Sequence[int], starts: Sequence[int], tables: Sequence[Sequence[int]]) -> Tensor:
        """Logits [texts, vocab] of one more token in each text; `starts` and `tables` as for `KVCache.select`."""
        texts = _rounded_up(len(ids), 1)
        pages = _rounded_up(max(map(len, tables)), FEWEST_PAGES)
        key = (self._model.active_adapter, texts, pages)
        if key not in self._recorded:
            self._recorded[key] = _Graph(self._model, self._cache, self._turns, texts, pages, self._scrap, self._pool)
        return self._recorded[key].replay(ids, starts, tables)


class _Graph:
    """A recorded step, and the tensors that it reads: they are filled anew before each replay."""

    def __init__(
        self, model: Llama, cache: KVCache, turns: Rotation, texts: int, pages: int, scrap: int,
        pool: Any,
    ) -> None:  # fmt: skip
        device = model.device
        self._scrap, self._width = scrap, 2 + pages
        # One row a text: its token, how many tokens it has, its pages. One tensor, so that one copy fills it.
        self._input = torch.full((texts, self._width), scrap, device=device)
        self._input[:, :2] = 0
        ids, starts, tables = self._input[:, :1], self._input[:, 1], self._input[:, 2:]

        def step() -> Tensor:
            turn = Rotation(turns.cos[starts][:, None], turns.sin[starts][:, None])
            hidden = model.hidden(ids, turn=turn, cache=_OneToken(cache, starts, tables))
            logits: Tensor = model.lm_head(hidden[:, 0])
            return logits

        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries make their workspaces in the first pass, which cannot be recorded
            step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._logits = step()

    def replay(self, ids: Sequence[int], starts: Sequence[int], tables: Sequence[Sequence[int]]) -> Tensor:
        rows = [
            [token, start, *table, *[self._scrap] * (self._width - 2 - len(table))]
            for token, start, table in zip(ids, starts, tables, strict=True)
        ]
        rows += [[0, 0, *[self._scrap] * (self._width - 2)]] * (len(self._input) - len(rows))
        self._input.copy_(torch.tensor(rows, device="cpu").pin_memory(), non_blocking=True)
        self._graph.replay()
        # A copy: another graph's passing values may lie where these do, for all share their memory.
        return self._logits[: len(ids)].clone()


class _OneToken:
    """A `Cache` whose texts are told by tensors, for one token each."""

    def __init__(self, cache: KVCache, starts: Tensor, tables: Tensor) -> None:
        self._cache, self.starts, self.tables = cache, starts, tables
        self.pages, self.slots = places(starts[:, None], tables)

    def layers(self) -> Sequence[LayerCache]:
        return [_Layer(layer, self) for layer in self._cache.layers()]

    def positions(self, new: int, device: torch.device) -> Tensor:
        return self.starts[:, None]

    def mask(self, new: int, device: torch.device) -> Tensor:
        """bool [texts, 1, 1, pages * PAGE]: what a text has, and its new token."""
        keys = torch.arange(self.tables.shape[1] * PAGE, device=device)
        return (keys <= self.starts[:, None])[:, None, None]

    def advance(self, new: int) -> None:
        """Nothing: the starts come from outside."""


class _Layer:
    def __init__(self, layer: LayerKV, texts: _OneToken) -> None:
        self._layer, self._texts = layer, texts

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> Tensor:
        texts = self._texts
        if runs_triton(q):
            from camelid.kernels.gpu.attention import attend

            new = keys[:, :, 0], values[:, :, 0]
            return attend(q[:, :, 0], new, *self._layer.in_memory(), texts.tables, texts.starts)[:, :, None]
        where = texts.pages, texts.slots, texts.tables
        kept_keys, kept_values = self._layer.made
        all_keys = only_own(kept_keys.store(keys, *where), texts.starts + 1)
        return attention(q, all_keys, only_own(kept_values.store(values, *where), texts.starts + 1), mask)


def _rounded_up(number: int, least: int) -> int:
    """To a power of two times `least`."""
    while least < number:
        least *= 2
    return least
