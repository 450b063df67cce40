"""What computes a step, and the torch model as such: any device, adapters, the reference of the native decoder
(`native.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

from camelid.errors import InputError
from camelid.generate.cache import KVCache
from camelid.generate.flat import Flat
from camelid.generate.graphs import Graphs
from camelid.kernels.decoder import PAGE
from camelid.kernels.device import free_on_gpu, on_its_gpu, runs_triton
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.lora import use_adapter


@dataclass(frozen=True)
class Chunk:
    """A text's share of a step: `ids` at `position` and after, its pages from the beginning on, with room for them, and
    of how many of the last tokens the logits are wanted."""

    ids: Sequence[int]
    position: int
    pages: Sequence[int]
    wanted: int = 1
    adapter: str | None = None


class Runner(Protocol):
    """Runs chunks and keeps their keys and values."""

    config: LlamaConfig

    @property
    def at_once(self) -> int:
        """Tokens of a step beyond which nothing is gained."""
        ...

    @property
    def adapters(self) -> Sequence[str]:
        """Names that a chunk may ask for."""
        ...

    @property
    def active(self) -> str | None:
        """The one that is active now, of a model that is its owner's too."""
        ...

    def stamp(self) -> str:
        """Another one whenever a weight has changed: keys and values of older weights are not this model's."""
        ...

    def page_bytes(self) -> int:
        """Of one page, over all layers."""
        ...

    def reserve(self, pages: int) -> None:
        """Make room for pages 0 … pages - 1. Told before the first step."""
        ...

    def copy(self, pages: Sequence[tuple[int, int]]) -> None:
        """What each first page holds, into each second one."""
        ...

    def run(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """The wanted logits of each chunk, float32 or the model's dtype, [wanted, vocab]."""
        ...

    def likeliest(self) -> Sequence[int]:
        """Of the last run, where each of the wanted rows is greatest, of all chunks in order; -1 where a score is no
        number. Empty where that has to be asked of the rows."""
        ...

    def states(self, chunk: Chunk) -> Tensor:
        """Feed one chunk; its last layer's normed states [tokens, hidden]."""
        ...


class TorchRunner:
    """Runs the torch model: short chunks of one length and one adapter together, long ones each alone; on a GPU with
    Triton all of one adapter together, single tokens as recorded graphs. Under dynamic RoPE scaling every text is run
    by itself and every prompt in one piece, for what a token gets depends on the length. Keys and values are kept in
    the model's dtype or, with `integers`, in int8."""

    def __init__(self, model: Llama, integers: bool = False) -> None:
        self.model, self.config = model, model.config
        self._cache = KVCache(model.config, integers)
        self._graphs: Graphs | None = None
        self._lock = Lock()
        self._lent: tuple[str | None] | None = None  # what the model's owner had active, while a pass has another

    @property
    def active(self) -> str | None:
        """The adapter that the model's owner has chosen, whatever another thread's pass is made with at this moment."""
        with self._lock:
            return self._lent[0] if self._lent else self.model.active_adapter

    def stamp(self) -> str:
        tensors = (*self.model.parameters(), *self.model.buffers())
        return str(hash(tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)))

    @property
    def at_once(self) -> int:
        if depends_on_length(self.config):
            return 1 << 30
        return 512 if self.model.device.type == "cpu" else 8192  # a GPU is idle over fewer

    @property
    def adapters(self) -> Sequence[str]:
        return list(self.model.adapters)

    def page_bytes(self) -> int:
        c = self.config
        head = c.head_size + 4 if self._cache.integers else c.head_size * self.model.dtype.itemsize
        return 2 * PAGE * c.num_hidden_layers * c.kv_heads * head

    def reserve(self, pages: int) -> None:
        """On a GPU all pages, for recorded steps know them by their place in memory; else they are made when they are
        first written."""
        self._cache.most = pages
        if self.model.device.type == "cuda" and not depends_on_length(self.config):
            with on_its_gpu(self.model.device), torch.inference_mode():
                room = free_on_gpu() // self.page_bytes()
                if pages + 1 > room:
                    raise InputError(f"the GPU has room for a cache of {room * PAGE:,} tokens, not {pages * PAGE:,}")
                self._cache.reserve(pages + 1, self.model.norm.weight)
                self._graphs = Graphs(self.model, self._cache, scrap=pages)

    @torch.inference_mode()
    def copy(self, pages: Sequence[tuple[int, int]]) -> None:
        self._cache.copy(pages)

    def run(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for numbers in self._passes(chunks):
            part = [chunks[n] for n in numbers]
            with on_its_gpu(self.model.device), self._using(part[0].adapter):
                found.update(zip(numbers, self._together(part), strict=True))
        return [found[number] for number in range(len(chunks))]

    def _passes(self, chunks: Sequence[Chunk]) -> list[list[int]]:
        """Numbers of the chunks that are run together."""
        alike: dict[object, list[int]] = {}
        for number, chunk in enumerate(chunks):
            single = len(chunk.ids) == 1 and chunk.wanted == 1
            if self._lays_flat:
                kind: object = single, chunk.adapter
            elif len(chunk.ids) <= PAGE and not depends_on_length(self.config):
                kind = len(chunk.ids), chunk.wanted, chunk.adapter
            else:
                kind = number, "alone"
            alike.setdefault(kind, []).append(number)
        return list(alike.values())

    @property
    def _lays_flat(self) -> bool:
        return self._graphs is not None and runs_triton(self.model.norm.weight)

    def likeliest(self) -> Sequence[int]:
        return ()

    @torch.inference_mode()
    def states(self, chunk: Chunk) -> Tensor:
        with on_its_gpu(self.model.device), self._using(chunk.adapter):
            return self._hidden([chunk])[0]

    @torch.inference_mode()
    def _together(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Chunks of one pass, so of one adapter."""
        if self._graphs is not None and all(len(c.ids) == 1 and c.wanted == 1 for c in chunks):
            logits = self._graphs.run(
                [c.ids[0] for c in chunks], [c.position for c in chunks], [c.pages for c in chunks]
            )
            return by_chunk(logits, chunks)
        hidden = self._hidden(chunks)
        if not any(c.wanted for c in chunks):  # keys and values only: no product with the whole vocabulary
            return [self.model.norm.weight.new_empty(0, self.config.vocab_size)] * len(chunks)
        kept = [states[len(c.ids) - c.wanted :] for states, c in zip(hidden, chunks, strict=True)]
        logits = self.model.lm_head(torch.cat(kept))
        return by_chunk(logits, chunks)

    @contextmanager
    def _using(self, adapter: str | None) -> Iterator[None]:
        """The model is its owner's too: what it has active is so again behind a pass. None is no adapter, not whatever
        happens to be active: the pages of a text hold what it began with."""
        active = self.model.active_adapter
        if adapter == active:
            yield
            return
        with self._lock:
            self._lent = (active,)
            use_adapter(self.model, adapter)
        try:
            yield
        finally:
            with self._lock:
                use_adapter(self.model, active)
                self._lent = None

    def _hidden(self, chunks: Sequence[Chunk]) -> Sequence[Tensor]:
        """Each chunk's states [tokens, hidden]."""
        starts, pages, device = [c.position for c in chunks], [c.pages for c in chunks], self.model.device
        if self._lays_flat:
            counts = [len(c.ids) for c in chunks]
            ids = torch.tensor([[i for c in chunks for i in c.ids]], device=device)
            states: Tensor = self.model.hidden(ids, cache=Flat(self._cache, starts, counts, pages, device))[0]
            return list(torch.split(states, counts))
        self._cache.select(starts, pages)
        ids = torch.tensor([list(c.ids) for c in chunks], device=device)
        return list(self.model.hidden(ids, cache=self._cache))


def by_chunk(logits: Tensor, chunks: Sequence[Chunk]) -> list[Tensor]:
    """Each chunk's rows of the wanted logits [wanted, vocab]."""
    return [logits] if len(chunks) == 1 else list(logits.split_with_sizes([c.wanted for c in chunks]))


def depends_on_length(config: LlamaConfig) -> bool:
    """Whether a token's keys depend on how long its text is: then they cannot be shared, nor computed in any pieces."""
    return config.rope_scaling.rope_type == "dynamic"
