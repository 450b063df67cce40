"""From a recipe to a run: the base, its adapter, the examples, the objective, what is held out."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from camelid.errors import InputError, RecipeError
from camelid.finetune.conversation import Encoder, end_of_turn
from camelid.finetune.pack import PackedExamples, Unit
from camelid.finetune.preference import Preference, measured
from camelid.finetune.read import Found, read_files
from camelid.finetune.records import BadRow, Record
from camelid.finetune.reference import reference_facts
from camelid.finetune.tasks import Task
from camelid.formats.load import load_tokenizer, open_model, read_model, resolve, stop_ids
from camelid.model.llama import Llama
from camelid.model.lora import LoraConfig, adapt, quantize_base
from camelid.recipe import FinetuneSection, Recipe
from camelid.tokenizer.template import NAMED, NEEDED
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.batch import Batch
from camelid.tokens.order import item_at
from camelid.train.loop import run
from camelid.train.loss import NextToken, Objective, loss_sum
from camelid.train.parallel import Ranks, ranks, shard, together
from camelid.train.step import Check, Job, autocast, micro_rows

HELD_OUT_ROWS = 16  # at most, for the losses along the way


@dataclass(frozen=True)
class Material:
    """What the files hold: units to learn from, units and records held out, and what was found."""

    units: list[Unit]
    good: list[bool]
    held_units: list[Unit]
    held_good: list[bool]
    held_records: list[Record]
    found: list[Found]


class Said(Protocol):
    """Where a run says what it found."""

    def __call__(self, text: str) -> None: ...


def finetune(recipe: Recipe, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Teach `model.from` from `data.files`. Returns the run's summary (see `loop.run`), and how many examples there
    were; with `evaluate.metric`, the task's figures before and after."""
    with ranks(recipe.parallel) as who:
        job, material = tuning(recipe, who, quiet)
        context = job.model.config.max_position_embeddings
        task = Task.of(recipe, material.held_records, job.generation["eos_token_id"], job.tokenizer, context)
        first = who.rank == 0
        if task and first:
            task.before(job.inputs[0], job.tokenizer, quiet)
        together(who)
        result = run(job, resume, who) | counted(job, material)
        if task and first and "stopped_by" not in result:
            result["task"] = task.after(job.inputs[0], Path(result["checkpoint"]), job.tokenizer, quiet)
        return result


def counted(job: Job, material: Material) -> dict[str, Any]:
    """How many examples a run has, of which formats, and what was left out."""
    source = job.source
    assert isinstance(source, PackedExamples)
    return {
        "examples": len(source.units), "left_out_too_long": source.left_out,
        "held_out_examples": len(material.held_units),
        "formats": dict(sum((f.formats for f in material.found), Counter())),
        "bad_rows": sum(len(f.bad) for f in material.found), "rows": len(source),
    }  # fmt: skip


def tuning(
    recipe: Recipe, who: Ranks, quiet: bool = True, weights: bool = True, references: bool = True
) -> tuple[Job, Material]:
    """The job of a fine-tuning. A plan can do without `weights`, the model has its shape only, and without
    `references`, which take a pass over the data."""
    settings = recipe.finetune or FinetuneSection()
    if recipe.model.from_ is None:
        raise RecipeError('the recipe lacks model.from, the model to fine-tune: [model] from = "path"')
    if not recipe.data.files:
        raise RecipeError('the recipe lacks data.files, the conversations: [data] files = ["chats.jsonl"]')
    loud = not quiet and who.rank == 0

    def say(text: str) -> None:
        if loud:
            print(text, file=sys.stderr)

    base = resolve(recipe.model.from_)
    tokenizer = tokenizer_of(base, settings)
    material = read_material(recipe, tokenizer, not loud)
    for found in material.found:
        say(found.said())
    train = recipe.train
    source = PackedExamples(material.units, train.sequence_length, train.seed, tokenizer.pad_token_id or 0)
    said_sizes(say, source, material.units)
    model, fingerprint = base_model(base, recipe, who, weights)
    stops = {*stop_ids(base)}
    ends = {end_of_turn(unit[0], tokenizer) for unit in material.units[:100]}
    stops |= {i for i in ends if i is not None}
    shard(model, who)
    objective: Objective = NextToken()
    held = held_out_batches(material, source, tokenizer)
    if settings.preference:
        objective = Preference(settings, micro_rows(train))
        needed = settings.method in ("dpo", "kto") and weights and references
        kept_in = Path(recipe.log.out)
        known = f"{fingerprint} {settings.stands_on} {settings.bits} {settings.group} {multiplied(who, train.dtype)}"
        with autocast(who.device, train.dtype):
            for packed, good in ((source, material.good), (held, material.held_good)):
                if packed:
                    before = model if needed else None
                    packed.facts = reference_facts(before, known, packed, good, kept_in, who, not loud)
    job = Job(
        model, tokenizer, source, recipe, [base, *files_of(recipe)],
        {"eos_token_id": sorted(stops)}, quiet, objective, checker(held, objective, who) if held else None,
        {"base_fingerprint": fingerprint} if model.adapters else {},
    )  # fmt: skip
    return job, material


def files_of(recipe: Recipe) -> list[Path]:
    """The files of examples."""
    return [Path(name).expanduser() for name in recipe.data.files]


def tokenizer_of(base: Path, settings: FinetuneSection) -> Tokenizer:
    """The base's tokenizer, with the template that the recipe names. Raises RecipeError when it has not its tokens."""
    tokenizer = load_tokenizer(base)
    if settings.template != "own":
        missing = [t for t in NEEDED.get(settings.template, ()) if t not in tokenizer.special_tokens.values()]
        if missing:
            raise RecipeError(
                f"finetune.template {settings.template} needs the control tokens {', '.join(missing)}, which {base}'s "
                "tokenizer has not: choose alpaca, which needs none"
            )
        tokenizer.chat_template = NAMED[settings.template]
    return tokenizer


def read_material(recipe: Recipe, tokenizer: Tokenizer, quiet: bool = True) -> Material:
    """Read and encode every record, and set some aside."""
    settings = recipe.finetune or FinetuneSection()
    encoder = Encoder(tokenizer)

    def use(found: Record) -> tuple[Record, Unit]:
        return found, unit_of(found, encoder, settings)

    pairs, founds = read_files(files_of(recipe), use, recipe.data.max_bad_share, quiet)
    count = round(recipe.data.held_out * len(pairs))
    if recipe.data.held_out and not 0 < count < len(pairs):
        raise RecipeError(f"data.held_out {recipe.data.held_out} of {len(pairs)} records leaves one side empty")
    chosen = {item_at(n, len(pairs), recipe.train.seed) for n in range(count)}
    kept = [p for n, p in enumerate(pairs) if n not in chosen]
    held = [pairs[n] for n in sorted(chosen)]
    if settings.method == "kto":
        kept, held = mismatched(kept, encoder), mismatched(held, encoder)
    return Material(
        [u for _, u in kept], [r.good is not False for r, _ in kept], [u for _, u in held],
        [r.good is not False for r, _ in held], [r for r, _ in held], founds,
    )  # fmt: skip


def unit_of(found: Record, encoder: Encoder, settings: FinetuneSection) -> Unit:
    """A record as the method learns it. Raises BadRow when it is of another kind."""
    if not settings.preference:
        if found.good is False:
            raise BadRow("is an answer marked as bad: set finetune.method to kto to learn from it, or take it out")
        if found.chosen is not None:
            raise BadRow("is a pair of answers: set finetune.method to dpo, orpo, kto or simpo, or give it one answer")
        return (encoder.document(found),)
    if settings.method == "kto":
        if found.good is None:
            raise BadRow("has no verdict: kto needs messages or completion, and label true or false")
        return (encoder.conversation(found.messages, found.tools, last=True),)
    if found.chosen is None or found.rejected is None:
        raise BadRow(f"is no pair of answers: {settings.method} needs chosen and rejected")
    return (
        encoder.conversation([*found.messages, *found.chosen], found.tools, last=True),
        encoder.conversation([*found.messages, *found.rejected], found.tools, last=True),
    )


def mismatched(pairs: Sequence[tuple[Record, Unit]], encoder: Encoder) -> list[tuple[Record, Unit]]:
    """Each answer, and beside it the same question with the next record's answer: what KTO's baseline is made of."""
    if len(pairs) == 1:
        raise InputError("data.files: kto compares each answer with another row's: give it two rows at least")
    found = []
    for n, (record, unit) in enumerate(pairs):
        other = pairs[(n + 1) % len(pairs)][0].messages[-1]
        said = {"role": "assistant", "content": other["content"] or json.dumps(other["tool_calls"])}
        beside = encoder.conversation([*record.messages[:-1], said], record.tools, last=True)
        found.append((record, (*unit, beside)))
    return found


def said_sizes(say: Said, source: PackedExamples, units: Sequence[Unit]) -> None:
    tokens = sum(len(e.ids) for unit in source.units for e in unit)
    learned = sum(e.learned() for unit in source.units for e in unit)
    say(
        f"{len(source.units):,} examples, {tokens:,} tokens, {learned:,} of them learned ({learned / tokens:.0%}), in "
        f"{len(source):,} rows of {source.sequence_length}"
    )
    if source.left_out:
        say(
            f"{source.left_out:,} of {len(units):,} examples are longer than train.sequence_length and are left out "
            f"(the longest needs {source.longest:,})"
        )


def base_model(base: Path, recipe: Recipe, who: Ranks, weights: bool) -> tuple[Llama, str]:
    """The model to teach, its adapter on it, and the base's fingerprint."""
    settings, train = recipe.finetune or FinetuneSection(), recipe.train
    kind = settings.stands_on
    checkpoint = open_model(base)
    if base.is_dir() and (base / "adapter_config.json").exists():
        if kind != "none":
            raise InputError(
                f"{base} is an adapter: a new one would stand on a model that is not on the disk. Merge it first "
                "(camelid merge), and fine-tune what comes out"
            )
        raise InputError(f"{base} is an adapter; to learn all weights, merge it first (camelid merge)")
    if train.sequence_length > checkpoint.config.max_position_embeddings:
        raise RecipeError(
            f"train.sequence_length {train.sequence_length} is longer than the model's max_position_embeddings "
            f"{checkpoint.config.max_position_embeddings}: lower it"
        )
    if kind != "none" and who.tensor > 1:
        raise RecipeError("parallel.tensor splits whole matrices, not adapters: set it to 1")
    # What is not learned needs no float32 beside the bfloat16 it is multiplied in.
    narrow = kind != "none" and who.world == 1 and multiplied(who, train.dtype) == torch.bfloat16
    dtype = torch.bfloat16 if narrow else torch.float32
    if weights:
        model, fingerprint = read_model(checkpoint, dtype, who.device, Llama)
    else:
        with torch.device("meta"):
            model, fingerprint = Llama(checkpoint.config).to(dtype), ""
    if kind == "qlora":
        quantize_base(model, settings.bits, settings.group)
    if kind != "none":
        config = LoraConfig(settings.rank, settings.alpha, tuple(settings.targets), settings.rslora, kind == "dora")
        adapt(model, config, seed=train.seed)
    return model, fingerprint


def multiplied(who: Ranks, dtype: str) -> torch.dtype:
    """The dtype that training multiplies in."""
    with autocast(who.device, dtype):
        kind = who.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


def held_out_batches(material: Material, like: PackedExamples, tokenizer: Tokenizer) -> PackedExamples | None:
    if not material.held_units:
        return None
    return PackedExamples(material.held_units, like.sequence_length, like.seed, tokenizer.pad_token_id or 0)


def checker(held: PackedExamples, objective: Objective, who: Ranks) -> Check:
    """Figures over (the first rows of) what is held out, the same on every rank."""
    rows = range(min(len(held), HELD_OUT_ROWS))

    def check(model: Llama) -> dict[str, float]:
        batches: list[Batch] = [held.batch_of([row]) for row in rows]
        if isinstance(objective, Preference):
            whole = objective.prepare(model, held.batch_of(list(rows)), who)
            return measured(model, [whole.part(row, row + 1) for row in rows], objective)
        total = sum(float(loss_sum(model, batch.to(model.device))) for batch in batches)
        return {"loss": total / sum(batch.supervised() for batch in batches)}

    return check


def planned(recipe: Recipe, who: Ranks, weights: bool) -> Job:
    """The job as `camelid plan` looks at it."""
    return tuning(recipe, who, weights=weights, references=False)[0]
