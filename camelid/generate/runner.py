"""What computes a step: the torch model (any device, adapters, the reference) or the native decoder on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

from camelid.errors import InputError
from camelid.generate.cache import KVCache
from camelid.generate.flat import Flat
from camelid.generate.graphs import Graphs
from camelid.kernels.decoder import MATRICES, PAGE, Decoder, LayerWeights, Rows, Shape, Text
from camelid.kernels.device import free_on_gpu, on_its_gpu, runs_triton
from camelid.kernels.memory import give_back, large_pages
from camelid.kernels.packed import BLOCK, Packed, Room, pack, pack_integers
from camelid.model.block import Block
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.lora import use_adapter
from camelid.model.quantized import QuantizedEmbedding, QuantizedLinear, is_quantized, round_to_nearest
from camelid.model.rope import rotation


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
            return _by_chunk(logits, chunks)
        hidden = self._hidden(chunks)
        if not any(c.wanted for c in chunks):  # keys and values only: no product with the whole vocabulary
            return [self.model.norm.weight.new_empty(0, self.config.vocab_size)] * len(chunks)
        kept = [states[len(c.ids) - c.wanted :] for states, c in zip(hidden, chunks, strict=True)]
        logits = self.model.lm_head(torch.cat(kept))
        return _by_chunk(logits, chunks)

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


class NativeRunner:
    """Runs the native decoder. `bits` rounds the layers' weights first, by groups of `group`; the output projection of
    a quantised model is in int8, but for one that is in whole numbers already. Keys and values are kept in `cache`:
    float32, bfloat16 or int8; by default bfloat16, but for a float32 model whose weights were not rounded. Without
    `keep` the model loses each layer as it is packed, so that it is not in memory twice."""

    at_once = 512
    adapters: Sequence[str] = ()
    active: str | None = None

    def __init__(
        self, model: Llama, bits: int | None = None, threads: int | None = None, group: int = 32,
        level: str | None = None, cache: torch.dtype | None = None, keep: bool = True,
    ) -> None:  # fmt: skip
        self.config = model.config
        threads = threads or torch.get_num_threads()
        integers = bits is not None or is_quantized(model)
        kind = str(model.dtype).removeprefix("torch.")
        room = Room()
        if keep:
            layers = [_layer(layer, bits, group, kind, room) for layer in model.layers]
        else:
            layers = []
            while len(model.layers):
                layers.append(_layer(model.layers.pop(0), bits, group, kind, room))
                give_back()
        head = _packed(model.lm_head, 8 if integers else None, 32, kind, room)
        embedding = _embedding(model.embed_tokens)
        self._decoder = Decoder(
            shape_of(model.config), embedding, layers, _norm(model.norm.weight), head, threads, level
        )
        whole = torch.float32 if kind == "float32" and not integers else torch.bfloat16
        self._kind = cache or whole
        if self._kind not in (torch.float32, torch.bfloat16, torch.int8):
            raise InputError(f"the cache can be float32, bfloat16 or int8, not {self._kind}")
        self._cache = torch.empty(0, 0, 0, dtype=torch.uint8, device="cpu")
        self._cos = self._sin = torch.empty(0, device="cpu")

    def stamp(self) -> str:
        return ""  # its weights are its own

    @property
    def weight_bytes(self) -> int:
        """What a step reads of the weights."""
        return self._decoder.weight_bytes

    def page_bytes(self) -> int:
        return self.config.num_hidden_layers * self._decoder.page_bytes(self._kind)

    def reserve(self, pages: int) -> None:
        self._cache = large_pages(pages * self.page_bytes()).view(pages, self.config.num_hidden_layers, -1)

    def copy(self, pages: Sequence[tuple[int, int]]) -> None:
        source, target = map(list, zip(*pages, strict=True))
        self._cache[target] = self._cache[source]

    def run(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        wanted: list[int] = []
        at = 0
        for chunk in chunks:
            at += len(chunk.ids)
            wanted += range(at - chunk.wanted, at)
        ids = [i for chunk in chunks for i in chunk.ids]
        texts = [Text(len(c.ids), c.position, c.pages) for c in chunks]
        self._turn(max([c.position + len(c.ids) for c in chunks]))
        logits = self._decoder.step(ids, texts, wanted, self._cos, self._sin, self._cache, self._kind)
        return _by_chunk(logits, chunks)

    def likeliest(self) -> Sequence[int]:
        return self._decoder.likeliest

    def states(self, chunk: Chunk) -> Tensor:
        self.run([replace(chunk, wanted=0)])
        return self._decoder.states(len(chunk.ids))

    def _turn(self, length: int) -> None:
        """Have cos and sin, [positions, head_dim / 2], of at least this many positions."""
        have = len(self._cos)
        if have < length:
            turn = rotation(self.config, torch.arange(max(length, 2 * have, 512), device="cpu"))
            self._cos, self._sin = turn.cos.contiguous(), turn.sin.contiguous()


def _by_chunk(logits: Tensor, chunks: Sequence[Chunk]) -> list[Tensor]:
    return [logits] if len(chunks) == 1 else list(logits.split_with_sizes([c.wanted for c in chunks]))


def shape_of(config: LlamaConfig) -> Shape:
    return Shape(
        config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads,
        config.kv_heads, config.head_size, config.vocab_size, config.rms_norm_eps,
    )  # fmt: skip


def depends_on_length(config: LlamaConfig) -> bool:
    """Whether a token's keys depend on how long its text is: then they cannot be shared, nor computed in any pieces."""
    return config.rope_scaling.rope_type == "dynamic"


def native_refusal(model: Llama) -> str | None:
    """Why the native decoder cannot run this model; None when it can."""
    if model.device.type != "cpu":
        return "it is not on the CPU"
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it is in {str(model.dtype).removeprefix('torch.')}"
    if model.adapters:
        return "it has adapters"
    if depends_on_length(model.config):
        return "its rope scaling is dynamic"
    if any(isinstance(m, QuantizedLinear) and m.group % BLOCK for m in model.modules()):
        return f"a layer's groups are not multiples of {BLOCK}"
    return shape_of(model.config).refusal()


def _layer(layer: torch.nn.Module, bits: int | None, group: int, kind: str, room: Room) -> LayerWeights:
    assert isinstance(layer, Block)
    linears = {name: getattr(layer.self_attn, name, None) or getattr(layer.mlp, name) for name in MATRICES}
    return LayerWeights(
        {name: _packed(linear, bits, group, kind, room) for name, linear in linears.items()},
        {name: _norm(linear.bias) for name, linear in linears.items() if linear.bias is not None},
        _norm(layer.input_layernorm.weight),
        _norm(layer.post_attention_layernorm.weight),
    )


def _packed(linear: torch.nn.Module, bits: int | None, group: int, kind: str, room: Room) -> Packed:
    if isinstance(linear, QuantizedLinear):
        weight = linear.integers()
    elif bits is None:
        assert isinstance(linear, torch.nn.Linear)
        return pack(linear.weight, kind, room)
    else:
        assert isinstance(linear, torch.nn.Linear)
        weight = round_to_nearest(linear.weight, bits, group)
    return pack_integers(weight.packed, weight.scale, weight.zero, weight.bits, room, weight.least)


def _embedding(module: torch.nn.Module) -> Rows:
    if isinstance(module, QuantizedEmbedding):
        scale, least = (None if t is None else t.half().contiguous() for t in (module.scale, module.least))
        return Rows(f"int{module.bits}", module.packed.contiguous(), scale, least)  # a model may have been cast
    assert isinstance(module, torch.nn.Embedding)
    weight = module.weight.detach()
    # A copy: what is only looked at would keep the whole file in memory, and be lost with it.
    return Rows(str(weight.dtype).removeprefix("torch."), weight.clone(memory_format=torch.contiguous_format))


def _norm(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.float32, copy=True).contiguous()
