"""From a recipe to a run: the base, its adapter, the examples, the objective, what is held out."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from camelid.errors import InputError, RecipeError
from camelid.finetune.conversation import Encoder, Example, end_of_turn
from camelid.finetune.grpo import rewarded
from camelid.finetune.pack import PackedExamples, Unit
from camelid.finetune.preference import Preference, measured
from camelid.finetune.read import Found, read_files
from camelid.finetune.records import BadRow, Record
from camelid.finetune.reference import reference_facts
from camelid.finetune.tasks import Task
from camelid.formats.adapter import is_adapter
from camelid.formats.load import load_tokenizer, open_model, read_model, resolve, stop_ids
from camelid.model.llama import Llama
from camelid.model.lora import LoraConfig, adapt
from camelid.model.quantized import keep_inputs, quantize_layers
from camelid.recipe import FinetuneSection, Recipe
from camelid.tokenizer.template import NAMED, NEEDED
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.batch import Batch, Source
from camelid.tokens.order import item_at
from camelid.train.loop import check_begun, run
from camelid.train.loss import NextToken, Objective, loss_sum
from camelid.train.parallel import Ranks, ranks, shard, together
from camelid.train.step import Check, Job, autocast, compute_dtype, micro_rows

HELD_OUT_ROWS = 16  # at most, for the losses along the way


@dataclass(frozen=True)
class Material:
    """What a recipe's base and files come to, before a weight is read: the tokenizer with its template, what is learned
    from, units, records and verdicts, and those held out, the ids that end an answer, and what was found."""

    base: Path
    tokenizer: Tokenizer
    source: PackedExamples
    held: PackedExamples | None
    good: list[bool]
    held_good: list[bool]
    records: list[Record]
    held_records: list[Record]
    stops: list[int]
    found: list[Found]

    def counted(self) -> dict[str, Any]:
        """How many examples there are, of which formats, and what was left out."""
        return {
            "examples": len(self.source.units), "left_out_too_long": self.source.left_out,
            "held_out_examples": len(self.held.units) if self.held else 0,
            "held_out_left_out_too_long": self.held.left_out if self.held else 0, "rows": len(self.source),
            "formats": dict(sum((f.formats for f in self.found), Counter())),
            "bad_rows": sum(len(f.bad) for f in self.found),
        }  # fmt: skip


def finetune(recipe: Recipe, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Teach `model.from` from `data.files`. Returns the run's summary (see `loop.run`), and how many examples there
    were; with `evaluate.metric`, the task's figures before and after."""
    with ranks(recipe.parallel) as who:
        first = who.rank == 0
        material = read_material(recipe, quiet or not first)
        base, tokenizer = material.base, material.tokenizer
        context = open_model(base).config.max_position_embeddings
        task = Task.of(recipe, material.held_records, material.stops, tokenizer, context)
        check_begun(Path(recipe.log.out), resume)  # before anything of another run is written over
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
    base, source, held = material.base, material.source, material.held
    model, fingerprint = base_model(base, recipe, who, weights)
    shard(model, who)
    objective: Objective = NextToken()
    questions: Source | None = None
    if settings.preference:
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
                if packed:
                    out = Path(recipe.log.out)
                    packed.facts = reference_facts(before, known, packed, good, out, who, not loud)
    check = checker(held, objective, who) if held else None
    if settings.method == "grpo":
        questions, objective, check = rewarded(
            recipe, material.records, material.held_records, material.tokenizer, material.stops, who, not loud
        )
    return Job(
        model, material.tokenizer, questions or source, recipe, [base, *files_of(recipe)],
        {"eos_token_id": material.stops}, quiet, objective, check,
        {"base_fingerprint": fingerprint} if model.adapters else {},
    )  # fmt: skip


def files_of(recipe: Recipe) -> list[Path]:
    """The files of examples."""
    return [Path(name).expanduser() for name in recipe.data.files]


def base_of(recipe: Recipe) -> Path:
    """The model to teach. Raises RecipeError when the recipe does not name it, or its files."""
    if recipe.model.from_ is None:
        raise RecipeError('the recipe lacks model.from, the model to fine-tune: [model] from = "path"')
    if not recipe.data.files:
        raise RecipeError('the recipe lacks data.files, the conversations: [data] files = ["chats.jsonl"]')
    return resolve(recipe.model.from_)


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


def read_units(recipe: Recipe, tokenizer: Tokenizer, quiet: bool) -> tuple[list[tuple[Record, Unit]], list[Found]]:
    """Every good record of the files, as it is learned, and what was found; said unless `quiet`."""
    settings, encoder = recipe.finetune or FinetuneSection(), Encoder(tokenizer)

    def use(found: Record) -> tuple[Record, Unit]:
        return found, unit_of(found, encoder, settings)

    pairs, founds = read_files(files_of(recipe), use, recipe.data.max_bad_share, quiet)
    for found in founds:
        _say(found.said(), quiet)
    return pairs, founds


def read_material(recipe: Recipe, quiet: bool = True) -> Material:
    """Read and encode every record, set some aside, and pack the others."""
    settings, train, base = recipe.finetune or FinetuneSection(), recipe.train, base_of(recipe)
    tokenizer = tokenizer_of(base, settings)
    pairs, founds = read_units(recipe, tokenizer, quiet)
    count = round(recipe.data.held_out * len(pairs))
    if recipe.data.held_out and not 0 < count < len(pairs):
        raise RecipeError(f"data.held_out {recipe.data.held_out} of {len(pairs)} records leaves one side empty")
    chosen = {item_at(n, len(pairs), train.seed) for n in range(count)}
    kept = [p for n, p in enumerate(pairs) if n not in chosen]
    held = [pairs[n] for n in sorted(chosen)]
    if settings.method == "kto":
        encoder = Encoder(tokenizer)
        kept, held = mismatched(kept, encoder), mismatched(held, encoder)

    def packed(units: list[Unit]) -> PackedExamples:
        return PackedExamples(units, train.sequence_length, train.seed, tokenizer.pad_token_id or 0)

    source = packed([unit for _, unit in kept])
    _say(sizes(source), quiet or settings.method == "grpo")
    ends = {end_of_turn(unit[0], tokenizer) for _, unit in kept[:100]}
    stops = {*stop_ids(base), *(i for i in ends if i is not None)}
    return Material(
        base, tokenizer, source, packed([unit for _, unit in held]) if held else None,
        [r.good is not False for r, _ in kept], [r.good is not False for r, _ in held], [r for r, _ in kept],
        [r for r, _ in held], sorted(stops), founds,
    )  # fmt: skip


def masks(recipe: Recipe, count: int, quiet: bool) -> tuple[list[Example], Tokenizer, list[Found]]:
    """The first examples as they would be learned from, packed nowhere."""
    tokenizer = tokenizer_of(base_of(recipe), recipe.finetune or FinetuneSection())
    pairs, founds = read_units(recipe, tokenizer, quiet)
    return [example for _, unit in pairs[:count] for example in unit], tokenizer, founds


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr)


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
        raise InputError("kto compares each answer with another row's: data.files, and what data.held_out sets aside, "
                         "need two rows at least")  # fmt: skip
    found = []
    for n, (record, unit) in enumerate(pairs):
        other = pairs[(n + 1) % len(pairs)][0].messages[-1]
        said = {"role": "assistant", "content": other["content"] or json.dumps(other["tool_calls"])}
        beside = encoder.conversation([*record.messages[:-1], said], record.tools, last=True)
        found.append((record, (*unit, beside)))
    return found


def sizes(source: PackedExamples) -> str:
    """How much there is to learn from, and what is left out, in words."""
    tokens = sum(len(e.ids) for unit in source.units for e in unit)
    learned = sum(e.learned() for unit in source.units for e in unit)
    said = (
        f"{len(source.units):,} examples, {tokens:,} tokens, {learned:,} of them learned ({learned / tokens:.0%}), in "
        f"{len(source):,} rows of {source.sequence_length}"
    )
    if source.left_out:
        said += (
            f"\n{source.left_out:,} of {source.left_out + len(source.units):,} examples are longer than "
            f"train.sequence_length and are left out (the longest needs {source.longest:,})"
        )
    return said


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
            f'{base} holds {checkpoint.quantized} weights, which cannot be learned: set finetune.method = "qlora", an '
            "adapter on top of them, or start from the full-precision model"
        )
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
        quantize_layers(model, settings.bits, settings.group, symmetric=False, rounds_inputs=False)
    if kind != "none":
        config = LoraConfig(settings.rank, settings.alpha, tuple(settings.targets), settings.rslora, kind == "dora")
        adapt(model, config, seed=train.seed)
    return model, fingerprint


def checker(held: PackedExamples, objective: Objective, who: Ranks) -> Check:
    """Figures over what is held out, at most so many rows of it: drawn, for the first ones hold the longest examples.
    The same on every rank."""
    rows = sorted(item_at(place, len(held), 0) for place in range(min(len(held), HELD_OUT_ROWS)))

    def check(model: Llama) -> dict[str, float]:
        batches: list[Batch] = [held.batch_of([row]) for row in rows]
        if isinstance(objective, Preference):
            whole = objective.prepare(model, held.batch_of(rows), who)
            return measured(model, [whole.part(n, n + 1) for n in range(len(rows))], objective)
        total = sum(float(loss_sum(model, batch.to(model.device))) for batch in batches)
        return {"loss": total / sum(batch.supervised() for batch in batches)}

    return check


def planned(recipe: Recipe, who: Ranks, weights: bool) -> Job:
    """The job as `camelid plan` looks at it."""
    return tuning(recipe, read_material(recipe), who, weights=weights, references=False)
