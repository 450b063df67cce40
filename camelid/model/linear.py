"""A linear layer that learns by our own products."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from camelid.kernels import float8
from camelid.kernels.products import linear

WORTH = 512  # a layer's smaller size from which on float8 gains more than rounding to it costs


class Linear(nn.Linear):
    """x W^T + b: [..., in] -> [..., out]. See `kernels.products.linear`, and while an `in_float8` one is learned from,
    `kernels.float8`."""

    in_float8 = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_float8 or not torch.is_grad_enabled():
            return linear(x, self.weight, self.bias)
        out = float8.linear(x, self.weight)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def use_float8(model: nn.Module) -> int:
    """Multiply in float8 wherever it is worth it. Returns how many layers that is."""
    layers = [m for m in model.modules() if isinstance(m, Linear) and _worth(m)]
    for layer in layers:
        layer.in_float8 = True
    return len(layers)


def _worth(layer: Linear) -> bool:
    sizes = layer.in_features, layer.out_features
    return min(sizes) >= WORTH and not any(size % float8.ALIKE for size in sizes)
