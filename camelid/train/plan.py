"""What a run will need, before it: memory by part, and the time of a step.

Sizes of weights, gradients, moments and checkpoints follow from the shape. What a layer keeps for the backward pass is
not guessed but listed by autograd, on a layer without storage. Speed is measured by a few steps that change nothing.
"""

from __future__ import annotations

import resource
import sys
import time

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from camelid.errors import RecipeError
from camelid.kernels.cross_entropy import CHUNK_BYTES
from camelid.model.block import Block
from camelid.model.config import LlamaConfig
from camelid.model.rope import Rotation, rotation
from camelid.recipe import TrainSection
from camelid.tokens.loader import batches
from camelid.train.guard import Stop
from camelid.train.optimizer import optimizer_for
from camelid.train.parallel import Ranks
from camelid.train.step import Job, autocast, micro_rows, rows_per_step, train_step

PROBE_STEPS = 6


def saved_by_layer(config: LlamaConfig, rows: int, length: int, settings: TrainSection, device: torch.device) -> int:
    """Bytes that one layer keeps for its backward pass, as autograd lists them."""
    table = rotation(config, torch.arange(length))
    with FakeTensorMode(allow_non_fake_inputs=True), device:
        block = Block(config)
        x = torch.empty(rows, length, config.hidden_size, requires_grad=True) * 1.0
        turn = Rotation(torch.empty_like(table.cos), torch.empty_like(table.sin))
        own = {t.untyped_storage()._cdata for t in (turn.cos, turn.sin, *block.parameters())}
        kept: list[Tensor] = []  # held, so that no two have one address

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast(device, settings.dtype):
            block(x, turn, None)
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
    return sum(size for place, size in sizes.items() if place not in own)


def memory(job: Job, who: Ranks | None = None) -> dict[str, int]:
    """Bytes by part, on this rank, with the micro-batch and the checkpointing that `fit` will choose or has chosen.

    `weights`, `gradients`, `optimizer`, `activations`, `loss` (a chunk of logits and the head's gradient), `copy` (what
    a checkpoint is written from), `process` (what is there without training), `peak`; and `checkpoint`, on the disk.
    """
    who = who or Ranks()
    settings, config = job.recipe.train, job.model.config
    number, share = config.num_parameters(), who.world
    moved = config.num_hidden_layers * _matrices(config) if settings.optimizer == "muon" else 0
    rows, length = min(micro_rows(settings), _own_rows(settings, who)), settings.sequence_length
    parts = {
        "weights": 4 * number // share,
        "gradients": 4 * number // share,
        "optimizer": (8 * number - 4 * moved) // share,
        "activations": _activations(job, rows, length, who.device),
        "loss": _loss(config, rows * length, settings, who.device),
    }
    checkpoint = 4 * number + 8 * number - 4 * moved
    every, background = job.recipe.checkpoint.every, job.recipe.checkpoint.background
    parts["copy"] = checkpoint if background and every and who.rank == 0 else 0
    accumulated = _own_rows(settings, who) > rows
    forward = parts["activations"] + parts["loss"] + (parts["gradients"] if accumulated else 0)
    kept = parts["weights"] + parts["optimizer"]
    parts["process"] = 0 if who.device.type == "cuda" else max(0, _resident() - parts["weights"])
    parts["peak"] = parts["process"] + kept + max(forward, parts["gradients"] + _spare(config)) + parts["copy"]
    parts["checkpoint"] = checkpoint
    return parts


def _own_rows(settings: TrainSection, who: Ranks) -> int:
    return rows_per_step(settings, who.data_world) // who.data_world


def _matrices(config: LlamaConfig) -> int:
    """Weights of one layer's matrices."""
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    layers = config.num_hidden_layers
    return (config.num_parameters() - embeddings - config.hidden_size) // layers - 2 * config.hidden_size


def _activations(job: Job, rows: int, length: int, device: torch.device) -> int:
    config = job.model.config
    layer = saved_by_layer(config, rows, length, job.recipe.train, device)
    state = 4 * rows * length * config.hidden_size
    if job.model.activation_checkpointing:
        return config.num_hidden_layers * state + layer + 4 * state
    return config.num_hidden_layers * layer + 4 * state  # the embedding's output, the last norm's three


def _loss(config: LlamaConfig, tokens: int, settings: TrainSection, device: torch.device) -> int:
    narrow = torch.bfloat16 if _bfloat16(settings, device) else torch.float32
    row = config.vocab_size * narrow.itemsize
    chunk = min(tokens, max(1, CHUNK_BYTES // row)) * row
    head = config.vocab_size * config.hidden_size
    return chunk + 4 * head + (2 * head if narrow == torch.bfloat16 else 0) + 4 * tokens * config.hidden_size


def _bfloat16(settings: TrainSection, device: torch.device) -> bool:
    with autocast(device, settings.dtype):
        return torch.is_autocast_enabled(device.type)


def _spare(config: LlamaConfig) -> int:
    """A tied embedding has two gradients for a moment: the head's and the lookup's."""
    return 4 * config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0


def fit(job: Job, parts: dict[str, int], who: Ranks) -> None:
    """Turn activation checkpointing on where the recipe says so, or where it leaves the choice and memory is short;
    `parts` follows. Raises RecipeError when the run does not fit even so."""
    settings = job.recipe.train
    job.model.activation_checkpointing = settings.activation_checkpointing == "on"
    limit = int(settings.memory_gib * 2**30) if settings.memory_gib else available(who)
    parts.update(memory(job, who))
    if parts["peak"] > limit and settings.activation_checkpointing == "auto":
        job.model.activation_checkpointing = True
        parts.update(memory(job, who))
    if parts["peak"] > limit:
        largest = max((n for n in parts if n not in ("peak", "checkpoint")), key=lambda n: parts[n])
        cure = (
            "train.micro_batch_rows=1" if largest in ("activations", "loss") else "a smaller model, or more processes"
        )
        raise RecipeError(
            f"the run needs {parts['peak'] / 2**30:.1f} GiB and may use {limit / 2**30:.1f} GiB; most is {largest}, "
            f"{parts[largest] / 2**30:.1f} GiB: try {cure}, or raise train.memory_gib"
        )


def available(who: Ranks) -> int:
    """Bytes that this rank may use: a GPU's memory, or its share of what the machine has free and it already holds."""
    if who.device.type == "cuda":
        return int(torch.cuda.mem_get_info(who.device)[0]) + int(torch.cuda.memory_reserved(who.device))
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 62  # not Linux: nothing is known, nothing is refused
    return (free + _resident() * who.world) // who.world


def _resident() -> int:
    """Bytes of this process that are in memory now."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def peak_memory(who: Ranks) -> int:
    """The most memory this process has held, bytes; on a GPU, of the GPU's."""
    if who.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(who.device))
    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seconds_per_step(job: Job, who: Ranks | None = None, stop: Stop | None = None) -> float:
    """The time of one step on this machine: the best of a few at rate 0, which change no weight."""
    who = who or Ranks()
    rows = rows_per_step(job.recipe.train, who.data_world)
    optimizer = optimizer_for(job.model, job.recipe.train)
    incoming = batches(job.source, 0, rows, rank=who.data_rank, world=who.data_world)
    seconds = []
    for number in range(PROBE_STEPS):  # the first ones also warm caches and allocators up
        started = time.monotonic()
        train_step(job, optimizer, next(incoming)[1], 0.0, who)
        seconds.append(time.monotonic() - started)
        if number and (sum(seconds) > 60 or (stop and stop.signal)):
            break
    return min(seconds[1:] or seconds)
