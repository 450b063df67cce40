"""Grouped-query attention, softmax(Q K^T / sqrt(d_k)) V, and the one function that computes it."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from camelid.model.config import LlamaConfig
from camelid.model.rope import Rotation, rotate


class LayerCache(Protocol):
    """Where one layer keeps the keys and values of earlier tokens."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values [batch, kv_heads, new, head_dim]; return all of them so far."""
        ...


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(Q K^T / sqrt(d_k)) V over [batch, heads, seq, head_dim]; k and v may have fewer heads.

    `mask` is bool, True where a query may look, broadcastable to [batch, heads, q_len, k_len]. None means causal:
    with more keys than queries the queries are the last ones.
    """
    causal = mask is None and q.shape[2] > 1
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError("a causal mask over cached keys must be given explicitly")
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


class Attention(nn.Module):
    """q, k, v projections, RoPE, attention, output projection: [batch, seq, hidden] -> the same."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_size
        q_size, kv_size = config.num_attention_heads * self.head_dim, config.kv_heads * self.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=bias)

    def forward(
        self,
        x: Tensor,
        turn: Rotation,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """`turn` rotates the new tokens; the cache holds earlier keys already rotated."""
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, turn), rotate(k, turn)
        if cache is not None:
            k, v = cache.append(k, v)
        out = attention(q, k, v, mask)
        out_proj: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return out_proj

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, seq, heads * head_dim] -> [batch, heads, seq, head_dim]."""
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)
