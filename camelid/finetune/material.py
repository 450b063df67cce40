"""What a recipe teaches from: the base's tokenizer, its files' records as they are learned, what is held out."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camelid.errors import InputError, RecipeError
from camelid.finetune.conversation import Encoder, Example, end_of_turn
from camelid.finetune.grpo import Questions, questions_of
from camelid.finetune.pack import PackedExamples, Unit
from camelid.finetune.read import Found, read_files
from camelid.finetune.records import BadRow, Record, asked_by
from camelid.formats.load import load_tokenizer, open_model, resolve, stop_ids
from camelid.recipe import FinetuneSection, Recipe
from camelid.tokenizer.template import NAMED, NEEDED
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.order import item_at

SOUGHT = 1000  # rows, for an answer to another question


@dataclass(frozen=True)
class Material:
    """What a recipe's base and files come to, before a weight is read: the tokenizer with its template, what is learned
    from, units, verdicts and records held out, the ids that end an answer, and what was found."""

    base: Path
    tokenizer: Tokenizer
    source: PackedExamples | Questions
    held: PackedExamples | Questions | None
    good: list[bool]
    held_good: list[bool]
    held_records: list[Record]
    stops: list[int]
    found: list[Found]

    def counted(self) -> dict[str, Any]:
        """How many examples there are, of which formats, and what was left out."""
        held = self.held.counted() if self.held else dict.fromkeys(self.source.counted(), 0)
        return {
            **self.source.counted(), **{f"held_out_{name}": count for name, count in held.items()},
            "formats": dict(sum((f.formats for f in self.found), Counter())),
            "bad_rows": sum(len(f.bad) for f in self.found),
        }  # fmt: skip


def files_of(recipe: Recipe) -> list[Path]:
    """The files of examples."""
    return [Path(name).expanduser() for name in recipe.data.files]


def base_of(recipe: Recipe) -> Path:
    """The model to teach. Raises RecipeError when the recipe does not name it, or its files."""
    if recipe.model.from_ is None:
        raise RecipeError('the recipe lacks model.from, the model to fine-tune: [model] from = "path"')
    if not recipe.data.files:
        raise RecipeError('the recipe lacks data.files, the conversations: [data] files = ["chats.jsonl"]')
    said = [f"model.{name}" for name in recipe.model.model_dump(exclude_none=True) if name != "from_"]
    if named := [*said, *(["data.tokens"] if recipe.data.tokens else [])]:
        raise RecipeError(
            f"{' and '.join(named)}: of a new model that is pre-trained; a fine-tuning has the shape of model.from and "
            "learns from data.files: take it out"
        )
    if recipe.data.weights:
        raise RecipeError(
            "data.weights: of folders of tokens in pre-training; all of data.files is learned: take it out"
        )
    told = recipe.evaluate
    if told.files and told.metric == "none":
        raise RecipeError("evaluate.files are questions for evaluate.metric, which is none: set it, or take them out")
    return resolve(recipe.model.from_)


def tokenizer_of(base: Path, settings: FinetuneSection) -> Tokenizer:
    """The base's tokenizer, with the template that the recipe names. Raises RecipeError when it has not its tokens,
    InputError when it is another model's."""
    tokenizer = load_tokenizer(base)
    tokenizer.check_rows(open_model(base).config.vocab_size, base)
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

    pairs, founds = read_files("data.files", files_of(recipe), use, recipe.data.max_bad_share, quiet)
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
    learned = {asked_by(one) for one, _ in kept} - {None}
    if again := sum(asked_by(one) in learned for one, _ in held):
        _say(f"{again} of the {len(held)} records held out ask what others that are learned from ask too", quiet)
    if settings.method == "kto":
        encoder = Encoder(tokenizer)
        kept, held = (mismatched(part, encoder, train.sequence_length) for part in (kept, held))

    def packed(units: list[Unit]) -> PackedExamples:
        return PackedExamples(units, train.sequence_length, train.seed, tokenizer.pad_token_id or 0)

    source: PackedExamples | Questions
    beside: PackedExamples | Questions | None
    if settings.method == "grpo":
        source, beside = questions_of(recipe, [r for r, _ in kept], [r for r, _ in held], tokenizer)
        _say(source.said(), quiet)
    else:
        source = packed([unit for _, unit in kept])
        try:
            beside = packed([unit for _, unit in held]) if held else None
        except InputError as error:
            raise RecipeError(f"data.held_out set {len(held)} records aside, of which {error}") from None
        _say(sizes(source), quiet)
    ends = {end_of_turn(unit[0], tokenizer) for _, unit in kept}
    stops = {*stop_ids(base), *(i for i in ends if i is not None)}
    return Material(
        base, tokenizer, source, beside, [r.good is not False for r, _ in kept],
        [r.good is not False for r, _ in held], [r for r, _ in held], sorted(stops), founds,
    )  # fmt: skip


def masks(recipe: Recipe, count: int, quiet: bool) -> tuple[list[Example], Tokenizer, list[Found]]:
    """The first examples as they would be learned from, packed nowhere. Raises InputError where none of them is."""
    if recipe.finetune and recipe.finetune.method == "grpo":
        raise InputError("finetune.method grpo learns from the model's own answers: no answer of the data has a mask")
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
            raise BadRow("is a pair of answers: set finetune.method to dpo, orpo or simpo, or give it one answer")
        return (encoder.document(found),)
    if settings.method == "kto":
        if found.good is None:
            raise BadRow("has no verdict: kto needs messages or completion, and label true or false")
        return (encoder.conversation(found.messages, found.tools, since=len(found.messages) - 1),)
    if found.chosen is None or found.rejected is None:
        raise BadRow(f"is no pair of answers: {settings.method} needs chosen and rejected")
    before = len(found.messages)
    return (
        encoder.conversation([*found.messages, *found.chosen], found.tools, since=before),
        encoder.conversation([*found.messages, *found.rejected], found.tools, since=before),
    )


def mismatched(pairs: Sequence[tuple[Record, Unit]], encoder: Encoder, length: int) -> list[tuple[Record, Unit]]:
    """Each answer, and beside it the same question with the next other question's answer, what KTO's baseline is made
    of: not learned, it is cut to what a row of `length` has room for."""
    if not pairs:
        return []
    if len(pairs) == 1:
        raise InputError("kto compares each answer with another row's: data.files, and what data.held_out sets aside, "
                         "need two rows at least")  # fmt: skip
    found = []
    for n, (record, unit) in enumerate(pairs):
        following = (pairs[(n + k) % len(pairs)][0].messages for k in range(1, min(len(pairs), SOUGHT)))
        other = next((m for m in following if m[:-1] != record.messages[:-1]), pairs[n - 1][0].messages)[-1]
        said = {"role": "assistant", "content": other["content"] or json.dumps(other["tool_calls"])}
        before = record.messages[:-1]
        beside = encoder.conversation([*before, said], record.tools, since=len(before))
        room = length - sum(len(e.ids) - 1 for e in unit) + 1
        found.append((record, unit, beside, room))
    shortest = min((beside for _, _, beside, _ in found), key=lambda e: len(e.ids) - e.learned())
    whole = []
    for record, unit, beside, room in found:
        # Where its own question leaves no room for one word of an answer, the shortest question does.
        fitting = next((c for e in (beside, shortest) if room > 0 and (c := _cut(e, room)).learned()), beside)
        whole.append((record, (*unit, fitting)))
    return whole


def _cut(example: Example, room: int) -> Example:
    return Example(example.ids[:room], example.labels[:room])


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
