"""A linear layer that learns by our own products."""

from __future__ import annotations

from torch import Tensor, nn

from camelid.kernels.products import linear


class Linear(nn.Linear):
    """x W^T + b: [..., in] -> [..., out]. See `kernels.products.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
