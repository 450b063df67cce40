"""Learning from rewards of the model's own answers: GRPO (arXiv:2402.03300), without a value model.

At each step the model, as it is then, answers every question of the batch `samples` times by the engine. An answer's
advantage is its reward less its group's mean, over the group's deviation, and its tokens become likelier by that much.
A batch is learned from once, so the paper's ratio of new to old probabilities is 1 and never clipped; like trl, nothing
holds the model to a reference. What a group agrees on teaches nothing and is left out of the step.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from camelid.errors import RecipeError
from camelid.evaluate.answers import last_number, same_number, same_text
from camelid.finetune.conversation import Example
from camelid.finetune.pack import PackedExamples
from camelid.finetune.preference import answer_log_probs
from camelid.finetune.records import Record
from camelid.finetune.tasks import questions
from camelid.generate.engine import Engine, Result
from camelid.generate.place import runner_for
from camelid.generate.runner import Runner, TorchRunner
from camelid.generate.sampling import SamplingParams
from camelid.kernels.decoder import PAGE
from camelid.kernels.device import uncompiled
from camelid.model.llama import Llama
from camelid.model.lora import merge
from camelid.model.quantized import is_quantized
from camelid.recipe import FinetuneSection, Recipe
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.batch import IGNORE, PADDING, Batch
from camelid.tokens.order import item_at
from camelid.train.parallel import Ranks
from camelid.train.step import Check, compute_dtype, rows_per_step

QUESTION, DRAW = 0, 1  # facts of a prompt: which question it is, and the number of the draw in the whole run
ADVANTAGE, ANSWERS = 0, 1  # facts of an answer: its advantage, and how many answers its batch had
HELD_OUT = 64  # questions asked along the way, at most
TOGETHER = 64  # answers at a time, which is what the engine takes


class Questions:
    """Prompts as a `Source`: a row is a question to be answered once, and the rows of a question follow each other.
    Records without a question that has room for an answer, or whose own answer nothing can equal, are left out."""

    def __init__(self, records: Sequence[Record], tokenizer: Tokenizer, recipe: Recipe) -> None:
        settings = recipe.finetune or FinetuneSection()
        room = recipe.train.sequence_length - settings.max_new_tokens
        found, _ = questions(records, len(records), tokenizer, room)
        self.asked = [q for q in found if settings.reward != "number" or last_number(q.reference) is not None]
        self.samples, self.recipe, self.left_out = settings.samples, recipe, len(records) - len(self.asked)
        self.prompts = [tokenizer.apply_chat_template(q.messages, tools=q.tools) for q in self.asked]

    def __len__(self) -> int:
        return len(self.asked) * self.samples

    def counted(self) -> dict[str, int]:
        """How many questions there are, and how many records are none."""
        return {"questions": len(self.asked), "left_out": self.left_out}

    def said(self) -> str:
        """The same in words."""
        each = rows_per_step(self.recipe.train) // self.samples
        out = f" ({self.left_out:,} records left out)" if self.left_out else ""
        return f"{len(self.asked):,} questions{out}; a step asks {each}, {self.samples} times each"

    def batch(self, position: int, rows: int) -> Batch:
        """The `rows` prompts from `position` on; facts float64 [rows, 1, 2]."""
        length, seed = self.recipe.train.sequence_length, self.recipe.train.seed
        ids, documents = torch.zeros(rows, length, dtype=torch.int64), torch.full((rows, length), PADDING)
        facts = torch.zeros(rows, 1, 2, dtype=torch.float64)
        for row, draw in enumerate(range(position, position + rows)):
            number = item_at(draw // self.samples, len(self.asked), seed)
            prompt = self.prompts[number]
            ids[row, : len(prompt)], documents[row, : len(prompt)] = torch.tensor(prompt), 0
            facts[row, 0, QUESTION], facts[row, 0, DRAW] = number, draw
        return Batch(ids, torch.full_like(ids, IGNORE), documents, one_document=True, facts=facts)


class Grpo:
    """GRPO as an `Objective`: prompts become answers in `prepare`. Its loss has no level: a step whose loss lies above
    the others' is one that tells something."""

    level = False

    def __init__(self, source: Questions, tokenizer: Tokenizer, stops: Sequence[int], recipe: Recipe) -> None:
        self.source, self.tokenizer, self.stops, self.recipe = source, tokenizer, stops, recipe
        self.settings = recipe.finetune or FinetuneSection()
        self.told: Mapping[str, float] = {}

    def count(self, batch: Batch) -> int:
        """Answers of the whole batch, those too that teach nothing."""
        assert batch.facts is not None
        return int(batch.facts[0, 0, ANSWERS])

    def prepare(self, model: Llama, batch: Batch, who: Ranks) -> Batch:
        """The batch's questions answered: packed answers with their advantages."""
        assert batch.facts is not None
        numbers, draws = (batch.facts[:, 0, fact].long().tolist() for fact in (QUESTION, DRAW))
        s, seed = self.settings, self.recipe.train.seed
        params = [
            SamplingParams(s.max_new_tokens, temperature=s.temperature, seed=seed_of(seed, draw)) for draw in draws
        ]
        found = self.answers(model, [self.source.prompts[n] for n in numbers], params)
        asked = [self.source.asked[n] for n in numbers]
        rewards = torch.tensor([reward(a, q.reference, s.reward) for a, q in zip(found, asked, strict=True)])
        advantage = advantages(rewards, s.samples)
        self.told = {
            "reward": float(rewards.mean()),
            "stopped_by_itself": sum(a.finish_reason == "eos" for a in found) / len(found),
            "answer_tokens": sum(len(a.ids) for a in found) / len(found),
            "groups_that_differ": float((advantage.view(-1, s.samples) != 0).any(1).double().mean()),
        }
        taught = advantage.nonzero().flatten().tolist() or [0]
        units, facts = [], []
        for n in taught:
            prompt = self.source.prompts[numbers[n]]
            units.append((Example([*prompt, *found[n].ids], [*[IGNORE] * len(prompt), *found[n].ids]),))
            facts.append([[float(advantage[n]), float(len(found))]])
        packed = PackedExamples(units, self.recipe.train.sequence_length, seed, self.tokenizer.pad_token_id or 0)
        packed.facts = torch.tensor(facts, dtype=torch.float64)
        return packed.batch_of(range(len(packed)))

    def __call__(self, model: Llama, batch: Batch, z_loss: float) -> Tensor:
        """Sum over answers of minus the advantage times the mean log-probability of the answer's tokens."""
        assert batch.facts is not None
        sums, counts = answer_log_probs(model, batch, self.settings.temperature)
        there = counts > 0
        advantage = batch.facts[:, : sums.shape[1], ADVANTAGE].to(sums)
        return -(advantage[there] * sums[there] / counts[there]).sum()

    def answers(
        self, model: Llama, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> Sequence[Result]:
        """What the model says as it is now."""
        room = min(len(prompts), TOGETHER) * -(-self.recipe.train.sequence_length // PAGE) * PAGE
        # Lengths that change with every token are not worth compiling for.
        with torch.no_grad(), uncompiled():
            runner = speaking(model, compute_dtype(model.device, self.recipe.train.dtype))
            return Engine(runner, self.tokenizer, self.stops, room).generate(prompts, params)

    def memory(self, model: Llama) -> int:
        """Bytes that answering takes: a copy of the model, of which a packed one is made (a tied embedding twice), and
        the cache."""
        dtype, config = compute_dtype(model.device, self.recipe.train.dtype), model.config
        rows = min(rows_per_step(self.recipe.train), TOGETHER)
        kept = rows * self.recipe.train.sequence_length * 2 * config.num_hidden_layers * config.kv_heads
        copies = 0 if is_quantized(model) else max(model.dtype.itemsize, 2 * dtype.itemsize)
        apart = copies and config.tie_word_embeddings * config.vocab_size * config.hidden_size * dtype.itemsize
        return model.num_parameters() * copies + apart + kept * config.head_size * dtype.itemsize

    def checker(self, held: Questions) -> Check:
        """The greedy answers' mean reward over questions that are not learned from."""
        asked, prompts = held.asked[:HELD_OUT], held.prompts[:HELD_OUT]

        def check(model: Llama) -> dict[str, float]:
            params = [SamplingParams(self.settings.max_new_tokens)] * len(prompts)
            found = self.answers(model, prompts, params)
            rewards = [reward(a, q.reference, self.settings.reward) for a, q in zip(found, asked, strict=True)]
            stopped = sum(a.finish_reason == "eos" for a in found)
            return {"reward": sum(rewards) / len(rewards), "stopped_by_itself": stopped / len(found)}

        return check


def reward(answer: Result, reference: str, kind: str) -> float:
    """1 for an answer that the model ended by itself and that is right, else 0."""
    same = same_number if kind == "number" else same_text
    return float(answer.finish_reason == "eos" and same(answer.text, reference))


def advantages(rewards: Tensor, samples: int) -> Tensor:
    """Each reward [answers] less the mean of its group of `samples`, over the group's standard deviation (+ 1e-4)."""
    groups = rewards.double().view(-1, samples)
    apart = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    return apart.flatten()


def seed_of(seed: int, draw: int) -> int:
    """What one answer of a run is drawn by."""
    digest = hashlib.blake2b(f"{seed} {draw}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def speaking(model: Llama, dtype: torch.dtype) -> Runner:
    """What answers as the model would now: a copy in this dtype with its adapter merged, in the native decoder where it
    takes it. A quantised model, which takes no adapter in, answers itself."""
    if is_quantized(model):
        return TorchRunner(model)
    twin = copy.deepcopy(model)
    for name in list(twin.adapters):
        merge(twin, name)
    return runner_for(twin.to(dtype))


def questions_of(
    recipe: Recipe, records: Sequence[Record], held: Sequence[Record], tokenizer: Tokenizer
) -> tuple[Questions, Questions | None]:
    """What is asked, and what is asked along the way. Raises RecipeError for a recipe that cannot be run."""
    settings, train = recipe.finetune or FinetuneSection(), recipe.train
    if train.z_loss:
        raise RecipeError(f"train.z_loss {train.z_loss:g} is of the loss per token, which grpo has none of")
    rows = rows_per_step(train)
    if rows % settings.samples:
        wanted = (rows // settings.samples + 1) * settings.samples * train.sequence_length
        raise RecipeError(
            f"train.global_batch_tokens {train.global_batch_tokens} is {rows} sequences, which is no whole number of "
            f"questions answered {settings.samples} times (finetune.samples): set it to {wanted}"
        )
    source = Questions(records, tokenizer, recipe)
    beside = Questions(held, tokenizer, recipe) if held else None
    for found, where in ((source, "data.files"), (beside, "data.held_out")):
        if found is not None and not found.asked:
            number = ", with a number" if settings.reward == "number" else ""
            raise RecipeError(
                f"finetune.method grpo: {where} has no record with an answer{number} and a question of at most "
                f"{train.sequence_length - settings.max_new_tokens} tokens (train.sequence_length less "
                "finetune.max_new_tokens)"
            )
    return source, beside
