"""The one LLaMA, for training and for inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from camelid.kernels.attention import Mask, packed
from camelid.kernels.byte_products import Bytes
from camelid.kernels.precision import product_dtype
from camelid.kernels.products import Weight
from camelid.model.attention import LayerCache
from camelid.model.block import Block, RMSNorm
from camelid.model.config import LlamaConfig
from camelid.model.init import initialize
from camelid.model.rope import Rotation, rotation


@dataclass(frozen=True)
class Output:
    """What a forward pass returns. `logits` [batch, seq, vocab] are scores of the next token, in the model's dtype."""

    logits: Tensor


class Cache(Protocol):
    """Keys and values of earlier tokens, one LayerCache a layer. `generate/cache.py` has the implementation."""

    def layers(self) -> Sequence[LayerCache]: ...

    def positions(self, new: int, device: torch.device) -> Tensor:
        """Positions of the next `new` tokens: [new], or [batch, new] when rows differ in length."""
        ...

    def mask(self, new: int, device: torch.device) -> Tensor | None:
        """What those tokens may look at, as in `attention`."""
        ...

    def advance(self, new: int) -> None:
        """Count `new` more tokens in every row, after all layers appended."""
        ...


class Llama(nn.Module):
    """Embedding, num_hidden_layers blocks, a final RMSNorm, an output projection (tied to the embedding or not).

    Built on the current default device and dtype; under `torch.device("meta")` it costs nothing. Weights are
    random (`model/init.py`) until `formats.load` fills them. With `activation_checkpointing` a layer keeps only its
    input and is computed again in the backward pass: the same gradients, less memory, a third more work.
    """

    head_bytes: Tensor | None
    head_scale: Tensor | None

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.adapters: dict[str, Any] = {}  # what stands on its linear layers, by name: see model/lora.py
        self.active_adapter: str | None = None
        # To draw weights on the meta device torch would load its whole compiler (1 s): there it is given empty ones.
        empty = torch.empty(config.vocab_size, config.hidden_size) if torch.empty(0).device.type == "meta" else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=empty)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # A copy of lm_head in bytes, for the loss over a base in bytes: see `multiply_head_in_bytes`.
        self.register_buffer("head_bytes", None, persistent=False)
        self.register_buffer("head_scale", None, persistent=False)
        self.tie()
        initialize(self, config)

    def tie(self) -> None:
        """Make the output projection the embedding again; needed after its tensor was replaced."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def head(self) -> Weight:
        """The output projection [vocab, hidden] as the loss of answers multiplies it."""
        if self.head_bytes is None or self.head_scale is None or self.device.type not in ("cpu", "meta"):
            return self.lm_head.weight
        return Bytes(self.head_bytes, self.head_scale.float())

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def num_parameters(self) -> int:
        """Number of weights; a tied projection counts once."""
        return sum(p.numel() for p in self.parameters())

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Score every next token. input_ids: int64 [batch, seq]. See `hidden` for the rest."""
        return Output(self.lm_head(self.hidden(input_ids, positions=positions, document_ids=document_ids, cache=cache)))

    def hidden(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        turn: Rotation | None = None,
    ) -> Tensor:
        """The last layer's normed states [batch, seq, hidden], before the output projection.

        positions: int64 [seq] or [batch, seq], default 0, 1, 2, … (after the cached tokens).
        document_ids: int64 [batch, seq]; a token sees only earlier tokens of its own document.
        cache: earlier tokens' keys and values, extended by this call; excludes document_ids.
        turn: the positions' rotation, where the caller has it already.
        """
        seq = input_ids.shape[1]
        if turn is None and positions is None:
            positions = cache.positions(seq, input_ids.device) if cache else torch.arange(seq, device=input_ids.device)
        mask: Mask = cache.mask(seq, input_ids.device) if cache else None
        if document_ids is not None:
            if cache is not None:
                raise ValueError("document_ids and cache cannot be combined")
            mask = packed(document_ids, product_dtype(self.norm.weight), self.config.head_size)
        # Only dynamic scaling needs the length. Past the trained context its frequencies change as the text grows;
        # like transformers, cached tokens keep the rotation they had when they were read.
        if turn is None:
            assert positions is not None
            length = int(positions.max()) + 1 if self.config.rope_scaling.rope_type == "dynamic" else 0
            turn = rotation(self.config, positions, length)

        x: Tensor = self.embed_tokens(input_ids)
        caches: Sequence[LayerCache | None] = cache.layers() if cache else [None] * len(self.layers)
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled() and cache is None:
                x = checkpoint(layer, x, turn, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, turn, mask, layer_cache)
        if cache:
            cache.advance(seq)
        out: Tensor = self.norm(x)
        return out
