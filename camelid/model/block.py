"""One Transformer layer: RMSNorm before each half, attention, then SwiGLU (LLaMA paper, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from camelid.kernels.attention import Mask
from camelid.kernels.elementwise import added, rms_norm, swiglu
from camelid.model.attention import Attention, LayerCache
from camelid.model.config import LlamaConfig
from camelid.model.linear import Linear
from camelid.model.rope import Rotation


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467), in float32 or better: see `rms_norm`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) * W_up x) (arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        d, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(d, hidden, bias=bias)
        self.up_proj = Linear(d, hidden, bias=bias)
        self.down_proj = Linear(hidden, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): [batch, seq, hidden] -> the same."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        turn: Rotation,
        mask: Mask = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x = added(x, self.self_attn(self.input_layernorm(x), turn, mask, cache))
        return added(x, self.mlp(self.post_attention_layernorm(x)))
