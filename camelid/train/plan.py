"""What a run will need, before it: memory by part, and the time of a step.

Sizes of weights, moments and checkpoints follow from the shape. What a step holds is not guessed but rehearsed
(`rehearse.py`). Speed is measured by a few steps that change nothing.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress

import torch

from camelid.errors import RecipeError
from camelid.kernels.crumbs import none_kept
from camelid.kernels.memory import give_back, installed
from camelid.kernels.products import takes
from camelid.model.llama import Llama
from camelid.recipe import TrainSection
from camelid.tokens.loader import batches
from camelid.train.guard import Stop
from camelid.train.optimizer import learned, moment_bytes, optimizer_for
from camelid.train.parallel import Ranks, anywhere
from camelid.train.rehearse import step_memory
from camelid.train.step import Job, compiled, compute_dtype, micro_rows, own_rows, rows_per_step, train_step

PROBE_STEPS = 6
WRITTEN_AT_ONCE = 256 << 20  # bytes: of a smaller copy about half is still there when the next step is at its peak
LIBRARIES = 32 << 20  # what they take at their first product
GROUP = 48 << 20  # and those of several processes


def memory(job: Job, who: Ranks | None = None) -> dict[str, int]:
    """Bytes by part, on this rank, with the micro-batch and the checkpointing that are chosen now.

    `weights`, `optimizer`, `step` (gradients, activations and a chunk of logits at their worst moment), `answers` (by
    how much more is held before a step, where a step makes its own), `copy` (what a
    checkpoint is written from while training goes on), `process` (what is there without training), `peak`, their sum;
    and `checkpoint`, on the disk.
    """
    who = who or Ranks()
    settings = job.recipe.train
    weights = {name: p.numel() * p.element_size() for name, p in job.model.named_parameters()}
    packed = sum(t.numel() * t.element_size() for t in job.model.buffers())
    gradients = {name: 4 * p.numel() for name, p in learned(job.model).items()}
    learning = sum(gradients.values())
    moments = moment_bytes(job.model, settings)
    own = own_rows(settings, who.data_world)
    rows = min(micro_rows(settings), own)
    step = step_memory(job.model, rows, -(-own // rows), settings, who.device, who.context)
    parts = {
        "weights": held(weights, who) + packed,  # of packed ones each rank holds all
        "optimizer": held(moments, who),
        # Between steps the gradients of all ranks are shared out; at the worst moment one layer's are whole.
        "step": max(step - learning, 0) + held(gradients, who),
    }
    if job.before_step:
        parts["answers"] = max(0, job.before_step - parts["step"])
    checkpoint = learning + sum(moments.values())
    on_cpu = who.device.type == "cpu"
    every, background = job.recipe.checkpoint.every, job.recipe.checkpoint.background
    if every and settings.steps and settings.steps <= every:
        every = None  # nothing is saved before the end
    gathered = (background and every) or who.world > 1  # the first rank holds whole tensors of what the ranks share
    there = checkpoint if checkpoint > WRITTEN_AT_ONCE else checkpoint // 2
    parts["copy"] = there if gathered and who.rank == 0 and on_cpu else 0
    made = 0 if job.model.device.type == "meta" else parts["weights"]
    gaps = int(gaps_share(job, -(-own // rows), who) * step) if keeps_memory(job.model) else 0
    parts["process"] = max(0, _resident() - made) + LIBRARIES + gaps + (GROUP if who.world > 1 else 0) if on_cpu else 0
    parts["peak"] = sum(parts.values())
    parts["checkpoint"] = checkpoint
    return parts


def keeps_memory(model: Llama) -> bool:
    """Whether a step's freed memory stays with the process: faster, but where nothing of a layer's size outlives the
    step the gaps between its blocks cost more than that is worth: under activation checkpointing, and under adapters in
    float32, where they come to two thirds of a step for a fourteenth of its time."""
    return not model.activation_checkpointing and (not model.adapters or model.dtype == torch.bfloat16)


def gaps_share(job: Job, micro_batches: int, who: Ranks) -> float:
    """What the gaps between kept blocks come to, of a step: where the next block of the same size just does not fit.
    Measured (docs/decisions.md): they are wider where gradients are made in float32, above all amid those of an earlier
    micro-batch, and where glibc keeps crumbs between them."""
    narrow = compute_dtype(who.device, job.recipe.train.dtype) == torch.bfloat16
    own = takes(torch.empty(0)) and who.tensor == 1 and not compiled(who.device, job.recipe.train)
    if job.model.adapters:
        amid_crumbs, without = 0.33, 0.31
    elif micro_batches > 1 and narrow:  # our own products sum gradients in float32
        amid_crumbs, without = 0.7 if own else 0.36, 0.25
    elif micro_batches > 1:
        amid_crumbs, without = 0.7, 0.62
    else:
        amid_crumbs, without = (0.28, 0.14) if narrow else (0.45, 0.22)
    return without if none_kept() else amid_crumbs


def held(sizes: Mapping[str, int], who: Ranks) -> int:
    """Of bytes by weight, what this rank holds between steps: tensor parallelism cuts the layers' matrices only, and
    all else is spread over the `shards`."""
    cut = sum(size for name, size in sizes.items() if name.startswith("layers.") and name.endswith("_proj.weight"))
    return cut // who.world + (sum(sizes.values()) - cut) // who.shards


def fit(job: Job, who: Ranks) -> tuple[dict[str, int], str | None]:
    """Turn activation checkpointing on where the recipe says so, or where it leaves the choice and memory is short.
    Returns the memory by part, and why the run does not fit even so, if it does not. All ranks decide alike."""
    settings = job.recipe.train
    limit = int(settings.memory_gib * 2**30) if settings.memory_gib else available(who)
    job.model.activation_checkpointing = settings.activation_checkpointing == "on"
    parts = memory(job, who)
    short = anywhere(who, int(parts["peak"] > limit))
    if short and settings.activation_checkpointing == "auto":
        job.model.activation_checkpointing = True
        parts = memory(job, who)
        short = anywhere(who, int(parts["peak"] > limit))
    if not short:
        return parts, _no_room_to_save(parts, who)
    largest = max((n for n in parts if n not in ("peak", "checkpoint")), key=lambda n: parts[n])
    fewer = "train.micro_batch_rows=1" if micro_rows(settings) > 1 else "a shorter train.sequence_length"
    cure = {"step": fewer, "answers": "a smaller model, or fewer answers a step (train.global_batch_tokens)"}.get(
        largest, "a smaller model, or more processes"
    )
    return parts, (
        f"the run needs {parts['peak'] / 2**30:.1f} GiB and may use {limit / 2**30:.1f} GiB; most is {largest}, "
        f"{parts[largest] / 2**30:.1f} GiB: try {cure}, or raise train.memory_gib"
    )


def _no_room_to_save(parts: dict[str, int], who: Ranks) -> str | None:
    """On a GPU: why a checkpoint, which the first rank gathers in the machine's own memory, does not fit there."""
    if who.device.type != "cuda":
        return None
    room = free_here(1)
    if not anywhere(who, int(who.rank == 0 and parts["checkpoint"] > room)):
        return None
    return (
        f"a checkpoint is gathered in the machine's memory, and its {parts['checkpoint'] / 2**30:.1f} GiB do not fit "
        f"into {room / 2**30:.1f}: take a machine with more memory, or train an adapter (finetune.method)"
    )


def available(who: Ranks) -> int:
    """Bytes that this rank may use: a GPU's memory, or its share of what the machine has free and it already holds."""
    if who.device.type == "cuda":
        return int(torch.cuda.mem_get_info(who.device)[0]) + int(torch.cuda.memory_reserved(who.device))
    return free_here(int(os.environ.get("LOCAL_WORLD_SIZE", who.world)))


def free_here(ranks: int) -> int:
    """Bytes of the machine's memory that each of so many processes on it may use."""
    held = _resident()  # first: what it gives back is free then
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 62  # not Linux: nothing is known, nothing is refused
    return min(free + held * ranks, installed()) // ranks


def _resident() -> int:
    """Bytes of this process that are in memory now, without what it has freed and not given back."""
    give_back()
    try:
        with open("/proc/self/statm", encoding="utf-8") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def peak_memory(who: Ranks) -> int:
    """The most memory this process has held, bytes; on a GPU, of the GPU's."""
    if who.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(who.device))
    with suppress(OSError, StopIteration), open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    # Begins with the parent's; kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def steps_wanted(settings: TrainSection, sequences: int, rows: int, seconds: float | None) -> int | None:
    """The updates that a recipe asks for, of `rows` of the epoch's `sequences` each: `steps`, `epochs`, or `minutes` of
    so many `seconds` a step. None when it does not say, or the seconds are not known. Raises RecipeError when the
    epochs are less than one step: it would read rows over and over."""
    if settings.epochs:
        if settings.epochs * sequences < rows - 1e-9:
            raise RecipeError(
                f"train.epochs {settings.epochs:g} is {settings.epochs * sequences:g} sequences of the data's "
                f"{sequences}, and one step reads {rows}: lower train.global_batch_tokens (a sequence is "
                f"{settings.sequence_length}), or say train.steps"
            )
        return max(1, math.ceil(settings.epochs * sequences / rows - 1e-9))  # all of it, and some of the next epoch
    if settings.minutes:
        return max(1, round(settings.minutes * 60 / seconds)) if seconds else None
    return settings.steps


def seconds_per_step(job: Job, who: Ranks | None = None, stop: Stop | None = None) -> float:
    """The time of one step on this machine: the best of a few at rate 0, which change no weight; their mean where some
    have less to learn from than others."""
    who = who or Ranks()
    rows = rows_per_step(job.recipe.train, who.data_world)
    optimizer = optimizer_for(job.model, job.recipe.train)
    incoming = batches(job.source, 0, rows, rank=who.data_rank, world=who.data_world)
    seconds = []
    for number in range(PROBE_STEPS):  # the first ones also warm caches and allocators up
        started = time.monotonic()
        train_step(job.model, optimizer, next(incoming)[1], job.recipe.train, 0.0, who, objective=job.objective)
        seconds.append(time.monotonic() - started)
        if number and anywhere(who, int(sum(seconds) > 60 or bool(stop and stop.signal))):
            break
    seconds = seconds[1:] or seconds
    return min(seconds) if job.objective.level else sum(seconds) / len(seconds)
