"""What the tests of generating share."""

from __future__ import annotations

import torch

from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama


def telling(config: LlamaConfig) -> Llama:
    """A model whose attention tells its tokens apart."""
    torch.manual_seed(0)
    model = Llama(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3) if weight.dim() > 1 else None
    return model
