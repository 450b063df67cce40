"""Supervised fine-tuning: conversations, rendered by the model's own chat template, loss on the answers only.

Which tokens are the answer is found by rendering: the conversation up to the turn, with the template's own
generation prompt, must be a prefix of the conversation with the turn. A template for which it is not is an error,
never a guess.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from camelid.errors import InputError, RecipeError
from camelid.formats.load import load, load_tokenizer, resolve
from camelid.model.llama import Llama
from camelid.recipe import Recipe
from camelid.tokenizer.template import Message
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.batch import IGNORE, Batch
from camelid.tokens.order import item_at
from camelid.train.loop import run
from camelid.train.parallel import Ranks, ranks, shard
from camelid.train.step import Job


@dataclass(frozen=True)
class Example:
    """Token ids of one conversation, and labels: the same ids where the model answers, IGNORE elsewhere."""

    ids: list[int]
    labels: list[int]


def read_conversations(path: Path) -> Iterator[list[Message]]:
    """Conversations of a .jsonl or .json file. Raises InputError naming the record and the fields it needs.

    A record has `messages`, or `prompt` and `completion`, or `instruction` (+ `input`) and `output`, or `question`
    and `answer`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        records = (
            json.loads(text)
            if path.suffix == ".json"
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
    except FileNotFoundError:
        raise InputError(f"data.files: {path} does not exist") from None
    except ValueError as error:
        raise InputError(f"data.files: {path} is not JSON lines: {error}") from None
    for number, record in enumerate(records, 1):
        yield _messages(record, f"{path}, record {number}")


def _messages(record: Any, where: str) -> list[Message]:
    if isinstance(record, dict):
        if isinstance(record.get("messages"), list):
            return list(record["messages"])
        for asked, answered in (("prompt", "completion"), ("instruction", "output"), ("question", "answer")):
            if isinstance(record.get(asked), str) and isinstance(record.get(answered), str):
                more = f"\n\n{record['input']}" if record.get("input") else ""
                return [
                    {"role": "user", "content": record[asked] + more},
                    {"role": "assistant", "content": record[answered]},
                ]
    raise InputError(
        f"{where} has neither messages, nor prompt and completion, instruction and output, question and answer"
    )


def encode_conversation(messages: Sequence[Message], tokenizer: Tokenizer) -> Example:
    """Ids and labels of a conversation; every assistant turn is learned, its end token included."""
    messages = [{**m, "content": m["content"].strip()} for m in messages]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    labels = [IGNORE] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before: list[int] = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True)
        through: list[int] = tokenizer.apply_chat_template(messages[: turn + 1], add_generation_prompt=False)
        if through[: len(before)] != before or ids[: len(through)] != through:
            raise InputError(
                "the chat template does not render a conversation as a prefix of its continuation, so the answer's "
                f"tokens cannot be told from the question's (turn {turn + 1})"
            )
        labels[len(before) : len(through)] = through[len(before) :]
    if all(label == IGNORE for label in labels):
        raise InputError("a conversation has no assistant turn: there is nothing to learn from it")
    return Example(ids, labels)


class PackedConversations:
    """Examples packed into rows of `sequence_length`, never attending to each other; one too long is left out."""

    def __init__(self, examples: Sequence[Example], sequence_length: int, seed: int, pad: int) -> None:
        self.sequence_length, self.seed, self.pad = sequence_length, seed, pad
        fitting = [e for e in examples if len(e.ids) <= sequence_length + 1]
        self.left_out = len(examples) - len(fitting)
        self.rows: list[list[Example]] = [[]]
        filled = 0
        for position in range(len(fitting)):
            example = fitting[item_at(position, len(fitting), seed)]
            size = len(example.ids) - 1
            if filled + size > sequence_length:
                self.rows.append([])
                filled = 0
            self.rows[-1].append(example)
            filled += size
        if not fitting:
            raise InputError(f"no example fits into train.sequence_length {sequence_length}: raise it")

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, position: int, rows: int) -> Batch:
        """The `rows` packed sequences from `position` on."""
        shape = (rows, self.sequence_length)
        ids, labels = torch.full(shape, self.pad), torch.full(shape, IGNORE)
        documents = torch.full(shape, -1)
        for r in range(rows):
            at = 0
            for number, example in enumerate(self.rows[item_at(position + r, len(self.rows), self.seed)]):
                end = at + len(example.ids) - 1
                ids[r, at:end] = torch.tensor(example.ids[:-1])
                labels[r, at:end] = torch.tensor(example.labels[1:])
                documents[r, at:end] = number
                at = end
        return Batch(ids, labels, documents, one_document=False)


def end_of_turn(example: Example, tokenizer: Tokenizer) -> int | None:
    """The control token that closes an answer: the last one among the learned tokens."""
    special = tokenizer.special_tokens
    return next((i for i in reversed(example.labels) if i in special), None)


def finetune(recipe: Recipe, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Fine-tune `model.from` on the conversations of `data.files`. Returns the run's summary (see `loop.run`)."""
    with ranks(recipe.parallel) as who:
        job, left_out, examples = tuning(recipe, who, quiet)
        return run(job, resume, who) | {"examples": examples, "left_out_too_long": left_out}


def tuning(recipe: Recipe, who: Ranks, quiet: bool) -> tuple[Job, int, int]:
    """The job of a fine-tuning, how many conversations are too long for it, and how many there are."""
    if recipe.model.from_ is None:
        raise RecipeError('the recipe lacks model.from, the model to fine-tune: [model] from = "path"')
    if not recipe.data.files:
        raise RecipeError('the recipe lacks data.files, the conversations: [data] files = ["chats.jsonl"]')
    base = resolve(recipe.model.from_)
    tokenizer = load_tokenizer(base)
    paths = [Path(name) for name in recipe.data.files]
    examples = [encode_conversation(c, tokenizer) for path in paths for c in read_conversations(path)]
    model: Llama = load(base, dtype=torch.float32, device=who.device)
    shard(model, who)
    settings = recipe.train
    source = PackedConversations(examples, settings.sequence_length, settings.seed, tokenizer.pad_token_id or 0)
    stops = {*model.config.stop_ids, end_of_turn(examples[0], tokenizer)} - {None}
    generation = {"eos_token_id": sorted(i for i in stops if i is not None)}
    job = Job(model, tokenizer, source, recipe, [base, *paths], generation, quiet)
    return job, source.left_out, len(examples)
