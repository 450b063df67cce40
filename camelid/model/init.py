"""How fresh weights are drawn.

The LLaMA papers do not state it. We take what torchtitan and GPT-2 share: normal with std `initializer_range`
(0.02), and the two projections that write into the residual stream scaled by 1/sqrt(2 * layers), so that the
stream's variance does not grow with depth.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from camelid.model.llama import Llama


@torch.no_grad()
def initialize(model: Llama, generator: torch.Generator | None = None) -> None:
    """Draw every weight of `model`; a no-op on the meta device."""
    if model.device.type == "meta":
        return
    std = model.config.initializer_range
    residual_std = std / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.normal_(parameter, std=residual_std, generator=generator)
        else:
            nn.init.normal_(parameter, std=std, generator=generator)
