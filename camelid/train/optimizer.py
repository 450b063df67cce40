"""AdamW (arXiv:1711.05101) over two groups, matrices decay, norms and biases do not; Muon for the blocks' matrices."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from camelid.errors import RecipeError
from camelid.model.llama import Llama
from camelid.recipe import TrainSection
from camelid.train.parallel import full, spread


class AdamW:
    """torch.optim.AdamW(fused=True): its step, its `param_groups` and the names in its `state`, to the bit. The base
    class of torch's loads a compiler, for 75 MiB and a second of every run."""

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        self.param_groups = [{"lr": lr, **group} for group in groups]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        self.betas, self.eps = betas, eps

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter with a gradient."""
        for group in self.param_groups:
            self._step(group)

    def _step(self, group: dict[str, Any]) -> None:
        moved = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not moved:
            return
        for parameter in moved:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        steps, first, second = ([self.state[p][name] for p in moved] for name in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            moved, [parameter.grad for parameter in moved], first, second, [], steps, lr=group["lr"],
            beta1=self.betas[0], beta2=self.betas[1], weight_decay=group["weight_decay"], eps=self.eps, amsgrad=False,
            maximize=False,
        )  # fmt: skip

    def zero_grad(self) -> None:
        """Let go of the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def optimizer_for(model: Llama, settings: TrainSection) -> AdamW:
    """The optimizer that the recipe names, of the weights that are learned; what Muon does not move is AdamW's. Raises
    RecipeError for Muon on adapters."""
    muon = settings.optimizer == "muon"
    if muon and model.adapters:
        raise RecipeError("train.optimizer muon moves whole matrices, not an adapter's factors: set it to adamw")
    matrices = _blocks_matrices(model) if muon else []
    moved = set(matrices)
    rest = [p for p in learned(model).values() if p not in moved]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    if muon:
        ratio = settings.muon_learning_rate / settings.learning_rate
        groups.append({"params": matrices, "weight_decay": settings.weight_decay, "muon_ratio": ratio})
    betas = (settings.beta1, settings.beta2)
    return (Muon if muon else AdamW)(groups, settings.learning_rate, betas, settings.eps)


def moment_bytes(model: Llama, settings: TrainSection) -> dict[str, int]:
    """Of what the optimizer keeps of each weight, by name: two float32 moments, one where Muon moves it."""
    moved = set(_blocks_matrices(model)) if settings.optimizer == "muon" else set()
    return {name: (4 if p in moved else 8) * p.numel() for name, p in learned(model).items()}


def learned(model: Llama) -> dict[str, Tensor]:
    """The weights that training moves, by name: all of them, or only the adapters."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _blocks_matrices(model: Llama) -> list[Tensor]:
    return [p for name, p in learned(model).items() if p.dim() == 2 and name.startswith("layers.")]


class Muon(AdamW):
    """Muon (Jordan et al. 2024) on the groups that have a `muon_ratio`, AdamW on the others.

    A matrix moves along the orthogonalised Nesterov momentum of its gradient, at muon_ratio times the group's rate.
    Its state is one `momentum` of the matrix's shape. Of a matrix that is spread over ranks, each orthogonalises the
    whole and keeps its part: the result does not depend on their number.
    """

    MOMENTUM = 0.95

    def _step(self, group: dict[str, Any]) -> None:
        if "muon_ratio" not in group:
            super()._step(group)
            return
        for parameter in group["params"]:
            self._move(parameter, group["lr"] * group["muon_ratio"], group["lr"] * group["weight_decay"])

    def _move(self, parameter: Tensor, rate: float, decay: float) -> None:
        if parameter.grad is None:
            return
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"]
        momentum.lerp_(parameter.grad, 1 - self.MOMENTUM)
        direction = spread(orthogonalized(full(parameter.grad.lerp(momentum, self.MOMENTUM))), parameter)
        rows, columns = parameter.shape
        parameter.mul_(1 - decay).add_(direction, alpha=-rate * math.sqrt(max(1.0, rows / columns)))


def orthogonalized(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of the matrix's singular value decomposition U S V^T, [rows, columns], by a Newton-Schulz iteration.

    The quintic's coefficients are those of Muon's reference: singular values end up between 0.7 and 1.2.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return x.T if tall else x
