"""One update: forward, loss, backward over the micro-batches, then clip and step, or skip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from camelid.errors import CamelidError, RecipeError
from camelid.kernels import float8
from camelid.kernels.device import compiles
from camelid.kernels.precision import native_dtype
from camelid.model.linear import WORTH, use_float8
from camelid.model.llama import Llama
from camelid.recipe import Recipe, TrainSection
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.batch import Batch, Source
from camelid.train.guard import objection
from camelid.train.loss import NextToken, Objective
from camelid.train.optimizer import AdamW
from camelid.train.parallel import Ranks, gradient_norm, local_gradients, total

MICRO_BATCH_TOKENS = 16384


Check = Callable[[Llama], dict[str, float]]
"""Figures of a model on what it does not learn from."""


@dataclass
class Job:
    """What one run trains: a model on a source, under a recipe. `inputs` and `facts` go into the manifests; `check` is
    asked every `evaluate.every` steps, before the first and after the last. `before_step` bytes are held, and given
    back, before a step's forward pass."""

    model: Llama
    tokenizer: Tokenizer
    source: Source
    recipe: Recipe
    inputs: list[Path]
    generation: dict[str, Any] = field(default_factory=dict)
    quiet: bool = False
    objective: Objective = field(default_factory=NextToken)
    check: Check | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    before_step: int = 0


@dataclass(frozen=True)
class Taken:
    """What a step found: the mean loss over the global batch (see `Objective.count`), the gradient's norm before
    clipping, how many tokens were supervised, how many positions were multiplied, padding too, and why the update was
    not applied, if it was not; and this rank's rows as they were learned from."""

    loss: float
    norm: float
    supervised: int
    positions: int
    skipped: str | None
    batch: Batch


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Products in `compute_dtype` over float32 weights."""
    return torch.autocast(device.type, torch.bfloat16, enabled=compute_dtype(device, dtype) == torch.bfloat16)


def compute_dtype(device: torch.device, dtype: str) -> torch.dtype:
    """What a run multiplies in: bfloat16 where the hardware has it, or as told; float8 is only some layers', see
    `take_float8`."""
    if dtype == "auto":
        return native_dtype(device)
    return torch.float32 if dtype == "float32" else torch.bfloat16


def compiled(device: torch.device, settings: TrainSection) -> bool:
    """Whether a run compiles its layers: where a GPU is and code for it can be made, or as told."""
    return (device.type == "cuda" and compiles()) if settings.compile is None else settings.compile


def check_float8(recipe: Recipe, who: Ranks, here: bool = True) -> None:
    """Raise RecipeError where the recipe asks for float8 and it, or the machine `here`, cannot."""
    settings = recipe.train
    if settings.dtype != "float8":
        return
    why = None
    if recipe.finetune and recipe.finetune.method != "full":
        why = "is for training all weights on texts and answers, pre-training or finetune.method full"
    elif who.tensor > 1:
        why = "does not work on matrices that processes share (parallel.tensor)"
    elif here and not float8.multiplies(who.device):
        why = "needs a GPU that multiplies it (H100, RTX 40 or later)"
    elif here and not compiled(who.device, settings):
        why = "is slower than bfloat16 in layers that are not compiled (camelid doctor says what that needs)"
    if why:
        raise RecipeError(f"train.dtype float8 {why}: set it to auto")


def take_float8(job: Job) -> None:
    """Let the layers that gain by it multiply in float8, where the recipe asks for it. Raises RecipeError where none
    would."""
    if job.recipe.train.dtype == "float8" and not use_float8(job.model):
        raise RecipeError(
            f"train.dtype float8 gains nothing in layers this small: they need sizes from {WORTH} on, multiples of "
            f"{float8.ALIKE}: set it to auto"
        )


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


def own_rows(settings: TrainSection, data_world: int) -> int:
    """Sequences of a global batch that one of the data ranks takes. Raises RecipeError as `rows_per_step` does."""
    return rows_per_step(settings, data_world) // data_world


def train_step(
    model: Llama, optimizer: AdamW, batch: Batch, settings: TrainSection, rate: float,
    who: Ranks | None = None, recent: Sequence[float] = (), objective: Objective | None = None,
) -> Taken:  # fmt: skip
    """One update on this rank's rows of the global batch; skipped when `guard.objection` has one."""
    who, objective = who or Ranks(), objective or NextToken()
    with autocast(model.device, settings.dtype):
        batch = objective.prepare(model, batch, who)
    mine = who.stretch(batch)
    counts = torch.tensor([mine.supervised(), mine.labels.numel(), objective.count(mine)], device=model.device)
    supervised, positions, count = (int(n) for n in total(who, counts))
    if not supervised:
        raise CamelidError("no token of a whole batch is supervised: check the data's labels")
    rows, micro = len(batch.input_ids), micro_rows(settings)
    loss = torch.zeros((), dtype=torch.float64, device=model.device)
    for first in range(0, rows, micro):
        with autocast(model.device, settings.dtype):
            part = objective(model, mine.part(first, first + micro).to(model.device), settings.z_loss) / count
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    loss = total(who, loss)
    norm = float(gradient_norm(model.parameters()))
    skipped = objection(float(loss), norm, recent if objective.level else (), settings)
    if skipped is None and norm > 0:  # where nothing is to be learned, moments and decay change nothing either
        if norm > settings.clip:
            torch._foreach_mul_(local_gradients(model.parameters()), settings.clip / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad()
    return Taken(float(loss), norm, supervised, positions, skipped, batch)
