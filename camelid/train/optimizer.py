"""AdamW (arXiv:1711.05101) over two groups: matrices decay, norms and biases do not; and its learning rate."""

from __future__ import annotations

import math

import torch

from camelid.model.llama import Llama
from camelid.recipe import TrainSection


def adamw(model: Llama, settings: TrainSection) -> torch.optim.AdamW:
    """The optimizer of a model, with torch's fused step."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.eps, fused=True)


def learning_rate(step: int, steps: int, settings: TrainSection) -> float:
    """The rate of update `step` (0-based) of `steps`: linear warm-up, then a cosine down to the floor share."""
    peak, floor = settings.learning_rate, settings.min_learning_rate_share
    warmup = min(settings.warmup_steps, max(1, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
