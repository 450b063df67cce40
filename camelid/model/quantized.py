"""Linear layers whose weight is kept as small integers with a scale and an offset per group: a frozen base to adapt.

w ~ scale * q + offset over groups of `group` weights of a row, q in 0 … 2^bits - 1, rounded to nearest between the
group's least and greatest weight (asymmetric). Products are made with the weight widened for the moment.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camelid.errors import InputError


class QuantizedLinear(nn.Module):
    """A frozen linear layer [in] -> [out] in `bits` (8 or 4) a weight. Raises InputError when groups do not divide."""

    packed: Tensor
    scale: Tensor
    offset: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, bits: int, group: int) -> None:
        super().__init__()
        out_features, in_features = linear.weight.shape
        if in_features % group:
            raise InputError(f"finetune.group {group} does not divide a layer's {in_features} inputs: choose another")
        self.bits, self.group = bits, group
        self.in_features, self.out_features = in_features, out_features
        packed, scale, offset = quantize(linear.weight.detach(), bits, group)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def dense(self) -> Tensor:
        """The weight [out, in] as it is multiplied, in the scale's dtype."""
        return dequantized(self.packed, self.scale, self.offset, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x.dtype), self.bias)


def quantize(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 [out, in * bits / 8] (two a byte for 4 bits, the even column low), scale and offset [out, in / group]."""
    groups = weight.view(len(weight), -1, group)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(weight.dtype).tiny)
    q = ((groups - low[..., None]) / scale[..., None]).round_().clamp_(0, 2**bits - 1).to(torch.uint8).flatten(1)
    return (q[:, ::2] | q[:, 1::2] << 4 if bits == 4 else q), scale, low


def dequantized(packed: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """The weight that `quantize` took, as near as its bits allow: [out, in], in the scale's dtype."""
    q = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1) if bits == 4 else packed
    wide = q.to(scale.dtype).view(*scale.shape, -1)
    return wide.mul_(scale[..., None]).add_(offset[..., None]).flatten(1)
