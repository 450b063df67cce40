"""From a recipe to a run: the base, its adapter, the examples, the objective, what is held out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from camelid.errors import InputError, RecipeError
from camelid.finetune.grpo import Grpo, Questions
from camelid.finetune.material import Material, files_of, read_material
from camelid.finetune.pack import PackedExamples
from camelid.finetune.preference import Preference, measured
from camelid.finetune.reference import reference_facts
from camelid.finetune.tasks import Task
from camelid.formats.adapter import is_adapter
from camelid.formats.load import open_model, read_model
from camelid.model.llama import Llama
from camelid.model.lora import LoraConfig, adapt
from camelid.model.quantized import keep_inputs, multiply_head_in_bytes, quantize_layers
from camelid.recipe import FinetuneSection, Recipe
from camelid.tokens.order import item_at
from camelid.train.loop import check_begun, run
from camelid.train.loss import NextToken, Objective, mean_loss
from camelid.train.parallel import Ranks, ranks, shard, together
from camelid.train.plan import steps_wanted
from camelid.train.step import Check, Job, autocast, check_float8, compute_dtype, micro_rows, rows_per_step

HELD_OUT_ROWS = 16  # at most, for the losses along the way


def finetune(recipe: Recipe, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Teach `model.from` from `data.files`. Returns the run's summary (see `loop.run`), and how many examples there
    were; with `evaluate.metric`, the task's figures before and after."""
    with ranks(recipe.parallel) as who:
        first = who.rank == 0
        if who.world > 1 and recipe.finetune and recipe.finetune.method == "grpo":
            raise RecipeError("finetune.method grpo runs in one process: the engine that answers holds the whole model")
        check_float8(recipe, who)
        material = read_material(recipe, quiet or not first)
        base, tokenizer = material.base, material.tokenizer
        context = open_model(base).config.max_position_embeddings
        task = Task.of(recipe, material.held_records, material.stops, tokenizer, context, quiet or not first)
        check_begun(Path(recipe.log.out), resume)  # before anything of another run is written over
        steps_wanted(recipe.train, len(material.source), rows_per_step(recipe.train, who.data_world), None)
        if task and first:
            task.before(base, tokenizer, quiet)
        together(who)
        # Nothing here holds the job: the task reads the model that was made, beside none that was trained.
        result = run(tuning(recipe, material, who, quiet), resume, who) | material.counted()
        if task and first and "stopped_by" not in result:
            result["task"] = task.after(base, Path(result["checkpoint"]), tokenizer, quiet)
        return result


def tuning(
    recipe: Recipe, material: Material, who: Ranks, quiet: bool = True, weights: bool = True, references: bool = True
) -> Job:
    """The job of a fine-tuning. A plan can do without `weights`, the model has its shape only, and without
    `references`, which take a pass over the data."""
    settings, train, loud = recipe.finetune or FinetuneSection(), recipe.train, not quiet and who.rank == 0
    check_float8(recipe, who, here=weights)
    base, source, held = material.base, material.source, material.held
    model, fingerprint = base_model(base, recipe, who, weights)
    shard(model, who)
    objective: Objective = NextToken()
    if settings.preference:
        if who.context > 1:
            raise RecipeError(
                f"parallel.context splits rows, and {settings.method} compares whole answers: set it to 1"
            )
        if train.z_loss:
            raise RecipeError(
                f"train.z_loss {train.z_loss:g} is of the loss per token, which {settings.method} has none of"
            )
        objective = Preference(settings, micro_rows(train))
        before = model if settings.method in ("dpo", "kto") and weights and references else None
        dtype = compute_dtype(who.device, train.dtype)
        known = f"{fingerprint} {settings.stands_on} {settings.bits} {settings.group} {dtype}"
        with autocast(who.device, train.dtype):
            for packed, good in ((source, material.good), (held, material.held_good)):
                if isinstance(packed, PackedExamples):
                    out = Path(recipe.log.out)
                    packed.facts = reference_facts(before, known, packed, good, out, who, not loud)
    check, answering = None, 0
    if isinstance(source, Questions):
        objective = Grpo(source, material.tokenizer, material.stops, recipe)
        check = objective.checker(held) if isinstance(held, Questions) else None
        answering = objective.memory(model)
    elif isinstance(held, PackedExamples):
        check = checker(held, objective, who)
    return Job(
        model, material.tokenizer, source, recipe, [base, *files_of(recipe)], {"eos_token_id": material.stops}, quiet,
        objective, check, {"base_fingerprint": fingerprint} if model.adapters else {}, answering,
    )  # fmt: skip


def base_model(base: Path, recipe: Recipe, who: Ranks, weights: bool) -> tuple[Llama, str]:
    """The model to teach, its adapter on it, and the base's fingerprint."""
    settings, train = recipe.finetune or FinetuneSection(), recipe.train
    kind = settings.stands_on
    checkpoint = open_model(base)
    if base.is_dir() and is_adapter(base):
        raise InputError(
            f"{base} is an adapter, and what it makes of its base is not on the disk: merge it first (camelid merge), "
            "and fine-tune what comes out"
        )
    if train.sequence_length > checkpoint.config.max_position_embeddings:
        raise RecipeError(
            f"train.sequence_length {train.sequence_length} is longer than the model's max_position_embeddings "
            f"{checkpoint.config.max_position_embeddings}: lower it"
        )
    if checkpoint.quantized and kind == "none" and checkpoint.format == "hf":
        raise InputError(
            f'{base} holds {checkpoint.quantized} weights, which cannot be learned: set finetune.adapter = "qlora", an '
            "adapter on top of them, or start from the full-precision model"
        )
    if checkpoint.quantized and kind == "qlora" and checkpoint.format == "hf" and weights and who.rank == 0:
        told = f"{base} holds {checkpoint.quantized} weights, which stay as they are"
        print(f"camelid: {told}: finetune.bits and group change nothing", file=sys.stderr)
    if kind != "none" and who.tensor > 1:
        raise RecipeError("parallel.tensor splits whole matrices, not adapters: set it to 1")
    # What is not learned needs no float32 beside the bfloat16 it is multiplied in.
    narrow = kind != "none" and who.world == 1 and compute_dtype(who.device, train.dtype) == torch.bfloat16
    dtype = torch.bfloat16 if narrow else torch.float32
    if weights:
        model, fingerprint = read_model(checkpoint, dtype, who.device, Llama)
    else:
        with torch.device("meta"):
            model, fingerprint = Llama(checkpoint.config).to(dtype), ""
    keep_inputs(model)
    if kind == "qlora":
        whole_rows = settings.bits == 8 and settings.group is None  # which a CPU can multiply as they are
        group = None if whole_rows else settings.group or 64
        quantize_layers(model, settings.bits, group, symmetric=whole_rows, rounds_inputs=False)
        if settings.method == "qlora":  # preferences and rewards are of probabilities, read off the projection itself
            multiply_head_in_bytes(model, who.device)
    if kind != "none":
        config = LoraConfig(settings.rank, settings.alpha, tuple(settings.targets), settings.rslora, kind == "dora")
        adapt(model, config, seed=train.seed)
    return model, fingerprint


def checker(held: PackedExamples, objective: Objective, who: Ranks) -> Check:
    """Figures over what is held out, at most so many rows of it: drawn, for the first ones hold the longest examples.
    The same on every rank."""
    rows = sorted(item_at(place, len(held), 0) for place in range(min(len(held), HELD_OUT_ROWS)))

    def check(model: Llama) -> dict[str, float]:
        if isinstance(objective, Preference):
            whole = objective.prepare(model, held.batch_of(rows), who)
            return measured(model, [whole.part(n, n + 1) for n in range(len(rows))], objective)
        return {"loss": mean_loss(model, (held.batch_of([row]) for row in rows), who)}

    return check


def planned(recipe: Recipe, who: Ranks, weights: bool) -> Job:
    """The job as `camelid plan` looks at it."""
    return tuning(recipe, read_material(recipe), who, weights=weights, references=False)
