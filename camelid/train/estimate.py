"""`camelid plan`: memory by part, speed, hours and money of a recipe, from its shape and a few steps on trial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from camelid.kernels.memory import large_blocks
from camelid.recipe import Recipe
from camelid.train import plan
from camelid.train.optimizer import learned
from camelid.train.parallel import Ranks, ranks
from camelid.train.schedule import drawn
from camelid.train.step import Job, compiled, rows_per_step, take_float8

Make = Callable[[Recipe, Ranks, bool], Job]
"""The job of a recipe on these ranks, with or without its weights."""


def estimate(recipe: Recipe, make: Make, price: float = 0.0, probe: bool = True) -> dict[str, Any]:
    """What the run of the job that `make` makes will need: `parameters`, `learned_parameters` (an adapter's are beside
    the model's), `memory_bytes` by part, `tokens_per_second` (supervised ones), `steps`, `hours`, `cost` (at `price` an
    hour), the schedule drawn, whether it `fits`, and all of it `said` in a line. Without `probe` no weight is made and
    no speed measured: a 65B model is planned on a laptop."""
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    with ranks(recipe.parallel) as who:
        job = make(recipe, who, probe)
        take_float8(job)
        parts, refused = plan.fit(job, who)
        probe = probe and not refused
        job.model.train()
        rows = rows_per_step(recipe.train, who.data_world)
        found: dict[str, Any] = {
            "parameters": job.model.config.num_parameters(),
            "learned_parameters": sum(p.numel() for p in learned(job.model).values()),
            "memory_bytes": parts,
            "fits": not refused,
        }
        said = refused or f"peak {parts['peak'] / 2**30:.2f} GiB"
        if job.model.activation_checkpointing:
            said += " with activation checkpointing"
        settings = recipe.train
        if probe and compiled(who.device, settings):  # as the run has them
            for layer in job.model.layers:
                layer.compile()
        with large_blocks(plan.keeps_memory(job.model)):
            seconds = plan.seconds_per_step(job, who) if probe else None
        steps = plan.steps_wanted(settings, len(job.source), rows, seconds)
        if seconds and steps:
            supervised = sum(job.source.batch(n * rows, rows).supervised() for n in range(4)) / 4
            hours = steps * seconds / 3600
            found |= {"hours": hours, "cost": price * hours}
            if supervised:  # else they are made in the step
                found["tokens_per_second"] = supervised / seconds
                said += f", {supervised / seconds:,.0f} tokens/s"
            said += f", {hours:.2f} hours"
            said += f", {price * hours:,.2f} at {price:g} an hour" if price else ""
        if steps:
            found |= {"steps": steps, "schedule": drawn(int(steps), settings)}
        return found | {"said": said}
