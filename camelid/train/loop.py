"""The training loop: forward, loss, backward, update; log, checkpoint, resume.

Which data a step sees depends only on its number (`tokens/order.py`), so a resumed run takes up the very next
sequence, and the same seed, threads and machine give the same weights bit for bit.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from camelid.errors import CamelidError, InputError
from camelid.model.llama import Llama
from camelid.recipe import Recipe, TrainSection
from camelid.report.page import Curve, Page
from camelid.report.progress import progress
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.batch import Source
from camelid.train import checkpoint
from camelid.train.checkpoint import LoopState
from camelid.train.loss import loss_sum
from camelid.train.optimizer import learning_rate, optimizer_for

MICRO_BATCH_TOKENS = 16384


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


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """bfloat16 arithmetic over float32 weights where the hardware has it, or as told."""
    if dtype == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        dtype = "bfloat16" if native else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def rows_per_step(settings: TrainSection) -> int:
    """Sequences in a global batch. Raises InputError when not one fits."""
    rows = settings.global_batch_tokens // settings.sequence_length
    if rows < 1:
        raise InputError(
            f"train.global_batch_tokens ({settings.global_batch_tokens}) is below train.sequence_length "
            f"({settings.sequence_length}): raise it to at least one sequence"
        )
    return rows


def train_step(job: Job, optimizer: torch.optim.Optimizer, position: int, rate: float) -> tuple[float, float]:
    """One update on the sequences from `position` on. Returns the mean loss per supervised token and gradient norm."""
    settings = job.recipe.train
    rows = rows_per_step(settings)
    micro = settings.micro_batch_rows or max(1, MICRO_BATCH_TOKENS // settings.sequence_length)
    batches = [job.source.batch(position + at, min(micro, rows - at)) for at in range(0, rows, micro)]
    supervised = sum(b.supervised() for b in batches)
    if not supervised:
        raise CamelidError(f"no token of the batch at sequence {position} is supervised: check the data's labels")
    total = 0.0
    for batch in batches:
        with autocast(job.model.device, settings.dtype):
            loss = loss_sum(job.model, batch) / supervised
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    norm = float(torch.nn.utils.clip_grad_norm_(job.model.parameters(), settings.clip))
    if not math.isfinite(total) or not math.isfinite(norm):
        raise CamelidError(
            f"the loss is {total}, the gradient norm {norm} at sequence {position}: the last checkpoint is intact. "
            "Lower train.learning_rate, or look at the data there"
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def planned_steps(job: Job) -> int:
    """How many updates the recipe asks for: `steps`, or `epochs`, or `minutes` at the measured speed."""
    settings, rows = job.recipe.train, rows_per_step(job.recipe.train)
    if settings.steps:
        return settings.steps
    if settings.epochs:
        return max(1, round(settings.epochs * len(job.source) / rows))
    if settings.minutes:
        optimizer = optimizer_for(job.model, settings)  # at rate 0: times the work without changing a weight
        seconds = []
        for step in range(6):  # the first ones also warm caches and allocators up
            started = time.monotonic()
            train_step(job, optimizer, step * rows, 0.0)
            seconds.append(time.monotonic() - started)
        return max(1, round(settings.minutes * 60 / min(seconds[1:])))
    raise InputError("the recipe does not say how long to train: set train.steps, train.epochs or train.minutes")


def run(job: Job, resume: bool = False) -> dict[str, Any]:
    """Train to the end of the recipe. Returns steps, loss, tokens, tokens_per_second, checkpoint, digest, and memory
    and speed planned and measured."""
    recipe, settings, out = job.recipe, job.recipe.train, Path(job.recipe.log.out)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    optimizer, state = optimizer_for(job.model, settings), LoopState()
    last = checkpoint.newest(out)
    if resume and last:
        state = checkpoint.restore(last, job.model, optimizer)
    elif last:
        raise InputError(f"{out} already holds a run: continue it with --resume, or choose another log.out")
    job.model.train()
    state.steps = state.steps or planned_steps(job)
    out.mkdir(parents=True, exist_ok=True)
    records = _records(out / "metrics.jsonl", before=state.step)
    rows, started, first_tokens = rows_per_step(settings), time.monotonic(), state.tokens
    with (out / "metrics.jsonl").open("w") as metrics, progress(out.name, state.steps, job.quiet) as advance:
        metrics.writelines(json.dumps(record) + "\n" for record in records)
        while state.step < state.steps:
            rate = learning_rate(state.step, state.steps, settings)
            loss, norm = train_step(job, optimizer, state.position, rate)
            state.step += 1
            state.position += rows
            state.tokens += rows * settings.sequence_length
            speed = (state.tokens - first_tokens) / (time.monotonic() - started)
            record = {"step": state.step, "loss": loss, "gradient_norm": norm, "learning_rate": rate,
                      "tokens": state.tokens, "tokens_per_second": round(speed, 1)}  # fmt: skip
            records.append(record)
            print(json.dumps(record), file=metrics, flush=True)
            advance(state.step, f"loss {loss:.3f}  {speed:,.0f} tokens/s")
            every = recipe.checkpoint.every
            if state.step == state.steps or (every and state.step % every == 0):
                _save(job, out, optimizer, state)
    _report(out, records, recipe)
    return _summary(job, out, state, records)


def _records(path: Path, before: int) -> list[dict[str, Any]]:
    """Records of an earlier part of the run, up to the step it resumes from."""
    if not before or not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [r for r in records if r["step"] <= before]


def _save(job: Job, out: Path, optimizer: torch.optim.Optimizer, state: LoopState) -> None:
    folder = out / "checkpoints" / f"step-{state.step:08}"
    checkpoint.write(folder, job.model, job.tokenizer, optimizer, state, inputs=job.inputs,
                     settings=job.recipe.settings(), generation=job.generation)  # fmt: skip
    checkpoint.prune(out, job.recipe.checkpoint.keep)


def _report(out: Path, records: list[dict[str, Any]], recipe: Recipe) -> None:
    page = Page(f"Run {out.name}")
    steps = [float(r["step"]) for r in records]
    page.plot("Training loss, nats per token", [Curve("loss", steps, [r["loss"] for r in records])], x="step")
    page.plot("Learning rate", [Curve("rate", steps, [r["learning_rate"] for r in records])], x="step")
    page.pre(json.dumps(recipe.settings(), indent=1))
    page.write(out / "report.html")


def _summary(job: Job, out: Path, state: LoopState, records: list[dict[str, Any]]) -> dict[str, Any]:
    folder = checkpoint.newest(out)
    if folder is None:
        raise CamelidError(f"{out} has no finished checkpoint")
    weights = job.model.num_parameters()
    # Peak resident size: kilobytes on Linux, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    speed = records[-1]["tokens_per_second"] if records else 0.0
    return {
        "steps": state.step,
        "loss": records[-1]["loss"] if records else None,
        "tokens": state.tokens,
        "tokens_per_second": speed,
        "checkpoint": str(folder),
        "digest": checkpoint.weights_digest(folder),
        # float32 weights, gradients and two moments; activations are not predicted in this version
        "planned": {"memory_bytes": 16 * weights},
        "measured": {"memory_bytes": peak, "tokens_per_second": speed},
    }
