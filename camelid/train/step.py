"""One update: forward, loss, backward over the micro-batches, then clip and step, or skip."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from camelid.errors import CamelidError, RecipeError
from camelid.model.llama import Llama
from camelid.recipe import Recipe, TrainSection
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.batch import Batch, Source
from camelid.train.guard import objection
from camelid.train.loss import loss_sum
from camelid.train.parallel import Ranks, gradient_norm, local_gradients, sync_gradients, total

MICRO_BATCH_TOKENS = 16384


class Loss(Protocol):
    """The sum of a batch's loss over its supervised tokens, a scalar."""

    def __call__(self, model: Llama, batch: Batch, z_loss: float) -> Tensor: ...


@dataclass
class Job:
    """What one run trains: a model on a source, under a recipe. `inputs` go into the manifests."""

    model: Llama
    tokenizer: Tokenizer
    source: Source
    recipe: Recipe
    inputs: list[Path]
    generation: dict[str, Any] = field(default_factory=dict)
    quiet: bool = False
    loss: Loss = loss_sum


@dataclass(frozen=True)
class Taken:
    """What a step found: the mean loss per supervised token of the global batch, the gradient's norm before clipping,
    how many tokens were supervised, and why the update was not applied, if it was not."""

    loss: float
    norm: float
    supervised: int
    skipped: str | None


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """bfloat16 arithmetic over float32 weights where the hardware has it, or as told."""
    if dtype == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        dtype = "bfloat16" if native else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def rows_per_step(settings: TrainSection, data_world: int = 1) -> int:
    """Sequences in a global batch. Raises RecipeError when not one fits, or the ranks cannot share them evenly."""
    rows = settings.global_batch_tokens // settings.sequence_length
    if rows < 1:
        raise RecipeError(
            f"train.global_batch_tokens ({settings.global_batch_tokens}) is below train.sequence_length "
            f"({settings.sequence_length}): raise it to at least one sequence"
        )
    if rows % data_world:
        better = (rows // data_world + 1) * data_world * settings.sequence_length
        raise RecipeError(
            f"train.global_batch_tokens {settings.global_batch_tokens} is {rows} sequences of "
            f"{settings.sequence_length}, which {data_world} data ranks cannot share evenly: set it to {better}"
        )
    return rows


def micro_rows(settings: TrainSection) -> int:
    """Rows that go through the model at once."""
    return settings.micro_batch_rows or max(1, MICRO_BATCH_TOKENS // settings.sequence_length)


def train_step(
    model: Llama, optimizer: torch.optim.Optimizer, batch: Batch, settings: TrainSection, rate: float,
    who: Ranks | None = None, recent: Sequence[float] = (), loss_of: Loss = loss_sum,
) -> Taken:  # fmt: skip
    """One update on this rank's rows of the global batch; skipped when `guard.objection` has one."""
    who = who or Ranks()
    supervised = int(total(who, torch.tensor(batch.supervised(), device=model.device)))
    if not supervised:
        raise CamelidError("no token of a whole batch is supervised: check the data's labels")
    rows, micro = len(batch.input_ids), micro_rows(settings)
    loss = torch.zeros((), dtype=torch.float64, device=model.device)
    for first in range(0, rows, micro):
        sync_gradients(model, who, first + micro >= rows)
        with autocast(model.device, settings.dtype):
            part = loss_of(model, batch.part(first, first + micro).to(model.device), settings.z_loss) / supervised
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    loss = total(who, loss)
    norm = float(gradient_norm(model.parameters()))
    skipped = objection(float(loss), norm, recent, settings)
    if skipped is None:
        if norm > settings.clip:
            torch._foreach_mul_(local_gradients(model.parameters()), settings.clip / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Taken(float(loss), norm, supervised, skipped)
