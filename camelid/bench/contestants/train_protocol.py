"""How every side of the training race is timed, whatever runs: a function `take(rows)` that makes one whole step of the
tokens [rows, length + 1] and returns its loss. The first step, in which some compile, is told by itself."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import process
import torch
from torch import Tensor

IGNORE = -100
Take = Callable[[Tensor], float]


def tokens_of(folder: Path) -> Tensor:
    """int64 [steps, rows, length + 1]."""
    return torch.from_numpy(np.load(folder / "tokens.npy"))


def labels_of(rows: Tensor, lora: bool) -> Tensor:
    """What is learned: everything, or for an adapter the answers, 122 of every 212 tokens."""
    found = rows[:, 1:].clone()
    if lora:
        found[:, torch.arange(found.shape[1]) % 212 < 90] = IGNORE
    return found


def torch_step(loss_of: Callable[[Tensor], Tensor], groups: Any, device: str, narrow: bool) -> Take:
    """A peer's step: `loss_of(rows)` under autocast, backward, clipped to 1, fused AdamW over `groups`."""
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    learned = [p for group in optimizer.param_groups for p in group["params"]]

    def take(rows: Tensor) -> float:
        with torch.autocast(device, torch.bfloat16, enabled=narrow):
            loss = loss_of(rows)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return take


def race(tokens: Tensor, take: Take, version: str, device: str, before: int) -> None:
    """Time the steps and print one JSON line. `before`: the peak memory before anything was trained."""
    seconds, losses = [], []
    for rows in tokens:
        started = time.perf_counter()
        losses.append(take(rows))
        seconds.append(time.perf_counter() - started)
    peak, positions = peak_bytes(device), tokens.shape[1] * (tokens.shape[2] - 1)
    print(json.dumps({"value": positions / median(seconds[1:]), "unit": "tokens/s", "version": version,
                      "first_step_seconds": seconds[0], "losses": losses, "peak_bytes": peak,
                      "peak_of_training": peak - before}))  # fmt: skip


def peak_bytes(device: str) -> int:
    """Of this process, or of the GPU's memory."""
    peak: int = torch.cuda.max_memory_allocated() if device == "cuda" else process.peak_bytes()
    return peak
