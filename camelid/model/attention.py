"""Grouped-query attention: the projections around `kernels.attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from camelid.kernels.attention import Mask, attention
from camelid.model.config import LlamaConfig
from camelid.model.linear import Linear
from camelid.model.rope import Rotation, rotate

Attend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]
"""`kernels.attention`, or what stands for it where rows are spread over processes."""


class LayerCache(Protocol):
    """Where one layer keeps the keys and values of earlier tokens."""

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> Tensor:
        """Add new keys and values [batch, kv_heads, new, head_dim]; attention of q [batch, heads, new, head_dim] over
        all of them so far."""
        ...


class Attention(nn.Module):
    """q, k, v projections, RoPE, attention, output projection: [batch, seq, hidden] -> the same."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_size
        q_size, kv_size = config.num_attention_heads * self.head_dim, config.kv_heads * self.head_dim
        bias = config.attention_bias
        self.q_proj = Linear(config.hidden_size, q_size, bias=bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=bias)
        self.attend: Attend = attention

    def forward(
        self,
        x: Tensor,
        turn: Rotation,
        mask: Mask = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """`turn` rotates the new tokens; the cache holds earlier keys already rotated."""
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, turn), rotate(k, turn)
        out = self.attend(q, k, v, mask) if cache is None else cache.attend(q, k, v, mask)
        out_proj: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return out_proj

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, seq, heads * head_dim] -> [batch, heads, seq, head_dim]."""
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)
