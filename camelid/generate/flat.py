"""Chunks of any lengths in one pass on a GPU: their tokens lie end to end in one row, and attention looks into each
text's pages. So many prompts, or guesses that differ in number, are read as fast as one long text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from camelid.generate.cache import KVCache, LayerKV
from camelid.kernels.attention import Mask
from camelid.kernels.decoder import PAGE
from camelid.model.attention import LayerCache
from camelid.model.config import LlamaConfig


class Flat:
    """A `Cache` of texts that have `starts` tokens each and get `counts` more, in the pages `tables`."""

    def __init__(
        self, cache: KVCache, starts: Sequence[int], counts: Sequence[int], tables: Sequence[Sequence[int]],
        device: torch.device,
    ) -> None:  # fmt: skip
        from camelid.kernels.gpu.attention import blocks_of

        self._cache = cache
        firsts = [sum(counts[:n]) for n in range(len(counts))]
        most = max(map(len, tables))
        table = _whole([[*t, *[0] * (most - len(t))] for t in tables])
        where = _whole([n for s, c in zip(starts, counts, strict=True) for n in range(s, s + c)])
        pages = _whole([t[n // PAGE] for t, s, c in zip(tables, starts, counts, strict=True) for n in range(s, s + c)])
        # One copy to the GPU for each, none of them waited for.
        self.where, self.tables = _there(where, device), _there(table, device)
        self.pages, self.slots = _there(pages, device), _there(where % PAGE, device)
        self.texts = _there(_whole(list(zip(firsts, counts, starts, strict=True))), device)
        self.blocks = _there(_whole(blocks_of(counts, _group(cache.config))), device)

    def layers(self) -> Sequence[LayerCache]:
        return [_Layer(layer, self) for layer in self._cache.layers()]

    def positions(self, new: int, device: torch.device) -> Tensor:
        return self.where

    def mask(self, new: int, device: torch.device) -> None:
        return None

    def advance(self, new: int) -> None:
        """Nothing: the starts come from outside."""


class _Layer:
    def __init__(self, layer: LayerKV, texts: Flat) -> None:
        self._layer, self._texts = layer, texts

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> Tensor:
        from camelid.kernels.gpu.attention import attend_chunks

        texts = self._texts
        for pages, new in zip(self._layer.made, (keys, values), strict=True):
            pages.write(new[0].transpose(0, 1), texts.pages, texts.slots)
        out = attend_chunks(q[0].transpose(0, 1), *self._layer.in_memory(), texts.tables, texts.texts, texts.blocks)
        return out.transpose(0, 1)[None]


def _group(config: LlamaConfig) -> int:
    return config.num_attention_heads // config.kv_heads


def _whole(numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _there(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
