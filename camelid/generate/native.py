"""The native decoder as what computes a step, on a CPU, and which models it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from camelid.errors import InputError
from camelid.generate.runner import Chunk, by_chunk, depends_on_length
from camelid.kernels.decoder import MATRICES, Decoder, LayerWeights, Rows, Shape, Text
from camelid.kernels.memory import give_back, large_pages
from camelid.kernels.packed import BLOCK, Packed, Room, pack, pack_integers
from camelid.model.block import Block
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.quantized import QuantizedEmbedding, QuantizedLinear, is_quantized, round_to_nearest
from camelid.model.rope import rotation


class NativeRunner:
    """Runs the native decoder. `bits` rounds the layers' weights first, by groups of `group`; the output projection of
    a quantised model is in int8, but for one that is in whole numbers already. Keys and values are kept in `cache`:
    float32, bfloat16 or int8; by default bfloat16, but for a float32 model whose weights were not rounded. Without
    `keep` the model, which was read by `formats.load`, loses each layer as it is packed, so that it is not in memory
    twice, and its embedding is looked up where it is."""

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
            layers = [_layer(layer, bits, group, kind, room, lose=False) for layer in model.layers]
        else:
            layers = []
            while len(model.layers):
                layers.append(_layer(model.layers.pop(0), bits, group, kind, room, lose=True))
                give_back()
        lose = not keep and not model.config.tie_word_embeddings
        head = _packed(model.lm_head, 8 if integers else None, 32, kind, room, lose)
        embedding = _embedding(model.embed_tokens, copy=keep)
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
        return ""  # nobody changes its weights

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
        return by_chunk(logits, chunks)

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


def shape_of(config: LlamaConfig) -> Shape:
    return Shape(
        config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads,
        config.kv_heads, config.head_size, config.vocab_size, config.rms_norm_eps,
    )  # fmt: skip


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


def _layer(
    layer: torch.nn.Module, bits: int | None, group: int, kind: str, room: Room, lose: bool
) -> LayerWeights:  # fmt: skip
    assert isinstance(layer, Block)
    linears = {name: getattr(layer.self_attn, name, None) or getattr(layer.mlp, name) for name in MATRICES}
    return LayerWeights(
        {name: _packed(linear, bits, group, kind, room, lose) for name, linear in linears.items()},
        {name: _norm(linear.bias) for name, linear in linears.items() if linear.bias is not None},
        _norm(layer.input_layernorm.weight),
        _norm(layer.post_attention_layernorm.weight),
    )


def _packed(linear: torch.nn.Module, bits: int | None, group: int, kind: str, room: Room, lose: bool) -> Packed:
    if isinstance(linear, QuantizedLinear):
        weight = linear.integers()
    elif bits is None:
        assert isinstance(linear, torch.nn.Linear)
        return pack(linear.weight, kind, room, lose)
    else:
        assert isinstance(linear, torch.nn.Linear)
        weight = round_to_nearest(linear.weight, bits, group)
    return pack_integers(weight.packed, weight.scale, weight.zero, weight.bits, room, weight.least, lose)


def _embedding(module: torch.nn.Module, copy: bool) -> Rows:
    if isinstance(module, QuantizedEmbedding):
        scale, least = (None if t is None else t.half().contiguous() for t in (module.scale, module.least))
        return Rows(f"int{module.bits}", module.packed.contiguous(), scale, least)  # a model may have been cast
    assert isinstance(module, torch.nn.Embedding)
    weight = module.weight.detach()
    rows = weight.clone(memory_format=torch.contiguous_format) if copy else weight.contiguous()
    return Rows(str(weight.dtype).removeprefix("torch."), rows)


def _norm(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.float32, copy=True).contiguous()
