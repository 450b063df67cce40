"""How fresh weights are drawn.

The LLaMA papers do not state it. We take what torchtitan and GPT-2 share: normal with std `initializer_range`
(0.02), and the two projections that write into the residual stream scaled by 1/sqrt(2 * layers), so that the
stream's variance does not grow with depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from camelid.model.config import LlamaConfig


@torch.no_grad()
def initialize(
    model: nn.Module,
    config: LlamaConfig,
    generator: torch.Generator | None = None,
    put: Callable[[Tensor, Tensor], object] = Tensor.copy_,
) -> None:
    """Draw every weight of a Llama of that shape; a no-op on the meta device. `put(parameter, whole tensor)` stores
    what was drawn, one tensor at a time: how a model that is spread over processes gets the weights of one that is
    not."""
    if next(model.parameters()).is_meta:
        return
    std = config.initializer_range
    residual_std = std / math.sqrt(2 * config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        drawn = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        if name.endswith("norm.weight"):
            drawn.fill_(1)
        elif name.endswith("bias"):
            drawn.zero_()
        else:
            small = name.endswith(("o_proj.weight", "down_proj.weight"))
            drawn.normal_(std=residual_std if small else std, generator=generator)
        put(parameter, drawn)
