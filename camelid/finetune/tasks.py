"""What a model answers before and after it was taught, on questions that it never learned from, and a score of both."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from camelid.disk import write_atomic
from camelid.errors import InputError, RecipeError
from camelid.evaluate.answers import AT_ONCE, explained, in_batches, last_number, scores
from camelid.evaluate.opened import measured_in
from camelid.finetune.conversation import Encoder
from camelid.finetune.read import read_files
from camelid.finetune.records import Record
from camelid.formats.load import load
from camelid.generate.engine import DEFAULT_CACHE, Engine
from camelid.generate.sampling import SamplingParams
from camelid.kernels.decoder import PAGE
from camelid.kernels.device import best_device
from camelid.model.llama import Llama
from camelid.recipe import EvaluateSection, Recipe
from camelid.report.page import Page
from camelid.tokenizer.template import Message
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.train.step import compute_dtype

BEFORE = "answers-before.json"
SHOWN = 10  # on the page


@dataclass(frozen=True)
class Question:
    """What is asked, and the answer of the data."""

    messages: list[Message]
    tools: list[Any] | None
    reference: str


@dataclass(frozen=True)
class Answer:
    """What a model answered, and whether it stopped by itself."""

    text: str
    stopped: bool
    tokens: int


def questions(
    records: Sequence[Record], limit: int, tokenizer: Tokenizer, room: int, numbers: bool = False
) -> tuple[list[Question], int]:
    """The first `limit` records that end in an answer, one that may be learned and with `numbers` holds one, and whose
    question has at most `room` tokens: what stands before the answer, and it. And how many had a longer question."""
    found: list[Question] = []
    longer = 0
    for record in records:
        if len(found) == limit:
            break
        turns = [*record.messages, *(record.chosen or [])]
        if turns and _is_reference(turns[-1], numbers) and record.good is not False:
            asked: list[Message] = [{**m, "content": m["content"].strip()} for m in turns[:-1]]
            if len(tokenizer.apply_chat_template(asked, tools=record.tools)) <= room:
                found.append(Question(asked, record.tools, turns[-1]["content"].strip()))
            else:
                longer += 1
    return found, longer


def _is_reference(turn: Message, number: bool) -> bool:
    """Whether a turn is an answer that another can be compared with."""
    said = turn["content"].strip() if turn["role"] == "assistant" and turn.get("weight") != 0 else ""
    return bool(said) and (not number or last_number(said) is not None)


class Task:
    """The task of one run: its questions, its metric, and its files in the run's folder."""

    def __init__(
        self, settings: EvaluateSection, out: Path, asked: Sequence[Question], stops: Sequence[int], longer: int = 0
    ) -> None:
        self.settings, self.out, self.asked, self.stops, self.longer = settings, out, list(asked), list(stops), longer
        self._measured = ""

    @classmethod
    def of(
        cls, recipe: Recipe, held: Sequence[Record], stops: Sequence[int], tokenizer: Tokenizer, context: int,
        quiet: bool = True,
    ) -> Task | None:  # fmt: skip
        """The recipe's task, or None. Raises RecipeError when it has no questions."""
        settings = recipe.evaluate
        if settings.metric == "none":
            return None
        records = list(held)
        if settings.files:
            paths = [Path(name).expanduser() for name in settings.files]
            encoder = Encoder(tokenizer)

            def use(record: Record) -> Record:
                encoder.check_roles([*record.messages, *(record.chosen or [])], record.tools)
                return record

            records, founds = read_files("evaluate.files", paths, use, recipe.data.max_bad_share)
            if not quiet:
                print(*(found.said() for found in founds), sep="\n", file=sys.stderr)
        room, numbers = context - settings.max_new_tokens, settings.metric == "number"
        asked, longer = questions(records, settings.examples, tokenizer, room, numbers)
        if not asked:
            raise RecipeError(
                f"evaluate.metric {settings.metric} has no questions: set data.held_out to a share, or "
                "evaluate.files, with questions that leave room for evaluate.max_new_tokens and answers to compare with"
            )
        found = cls(settings, Path(recipe.log.out), asked, stops, longer)
        found.score([Answer(q.reference, True, 1) for q in asked])  # a wrong tokenizer is told before training
        return found

    def before(self, source: Path, tokenizer: Tokenizer, quiet: bool) -> None:
        """Ask the base, once: a resumed run finds the answers."""
        if self._before(source, tokenizer) is None:
            found = self.answers(source, tokenizer, "answers before", quiet)
            self.out.mkdir(parents=True, exist_ok=True)
            kept = {"key": self._key(source, tokenizer), "answers": [asdict(a) for a in found]}
            write_atomic(self.out / BEFORE, json.dumps(kept, ensure_ascii=False))

    def after(self, base: Path, source: Path, tokenizer: Tokenizer, quiet: bool) -> dict[str, Any]:
        """Ask what the run made, and write answers.jsonl and answers.html. Returns both scores and their protocol."""
        before = self._before(base, tokenizer)
        if before is None:
            raise InputError(f"{self.out / BEFORE} was changed while the model was trained")
        found = self.answers(source, tokenizer, "answers after", quiet)
        scores = {"before": self.score(before), "after": self.score(found)}
        lines = [
            json.dumps({"messages": q.messages, "reference": q.reference, "before": asdict(b), "after": asdict(a)},
                       ensure_ascii=False)
            for q, b, a in zip(self.asked, before, found, strict=True)
        ]  # fmt: skip
        write_atomic(self.out / "answers.jsonl", "\n".join(lines) + "\n")
        self._page(scores, before, found)
        protocol = self._protocol(scores["after"])
        return {"metric": self.settings.metric, **scores, "questions": len(self.asked), "protocol": protocol}

    def answers(self, source: Path, tokenizer: Tokenizer, label: str, quiet: bool) -> list[Answer]:
        """What the model at `source` answers."""
        device = best_device()
        model: Llama = load(source, dtype=compute_dtype(device, "auto"), device=device)
        prompts = [tokenizer.apply_chat_template(q.messages, tools=q.tools) for q in self.asked]
        longest = max(map(len, prompts)) + self.settings.max_new_tokens + PAGE
        together = max(1, min(AT_ONCE, len(prompts), DEFAULT_CACHE // longest))  # the others wait
        engine = Engine(model, tokenizer, self.stops, together * longest)
        self._measured = measured_in(model, tokenizer)
        lengths = [len(q.reference) for q in self.asked]
        found = in_batches(engine, prompts, self._params(), lengths, label, quiet)
        return [Answer(r.text.strip(), r.finish_reason == "eos", len(r.ids)) for r in found]

    def _params(self) -> list[SamplingParams]:
        s = self.settings
        return [
            SamplingParams(
                s.max_new_tokens, temperature=s.temperature, repetition_penalty=s.repetition_penalty,
                frequency_penalty=s.frequency_penalty, seed=n if s.temperature else None,
            )
            for n in range(len(self.asked))
        ]  # fmt: skip

    def score(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The metric of all answers, and the share of them that the model ended by itself."""
        texts, references = [a.text for a in answers], [q.reference for q in self.asked]
        found, _ = scores(self.settings.metric, texts, references, self.settings.tokenize)
        return found | {"stopped_by_itself": sum(a.stopped for a in answers) / len(answers)}

    def _before(self, base: Path, tokenizer: Tokenizer) -> list[Answer] | None:
        """What the base answered to these very questions, if it was asked."""
        try:
            kept = json.loads((self.out / BEFORE).read_text(encoding="utf-8"))
            return [Answer(**a) for a in kept["answers"]] if kept["key"] == self._key(base, tokenizer) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _key(self, base: Path, tokenizer: Tokenizer) -> str:
        files = [base] if base.is_file() else sorted(p for p in base.iterdir() if p.is_file())
        known = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        asked = [(q.messages, q.tools, q.reference) for q in self.asked]
        s = self.settings
        how = [s.max_new_tokens, s.temperature, s.repetition_penalty]
        how += [s.frequency_penalty] if s.frequency_penalty else []
        parts = [known, tokenizer.digest(), tokenizer.chat_template, how, self.stops, asked]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _protocol(self, figures: dict[str, Any]) -> str:
        s = self.settings
        compared = explained(s.metric)
        if "protocol" in figures:  # BLEU's signature, ROUGE's tokenizer and stemmer
            compared += f" ({figures['protocol']})"
        drawn = f"drawn at temperature {s.temperature:g} by each one's number" if s.temperature else "greedy"
        source = f"of {', '.join(s.files)}" if s.files else "not learned from"
        penalty = f", repetition penalty {s.repetition_penalty:g}" if s.repetition_penalty != 1 else ""
        penalty += f", frequency penalty {s.frequency_penalty:g}" if s.frequency_penalty else ""
        source += f" ({self.longer} longer ones left out, which leave no room for an answer)" if self.longer else ""
        return (
            f"{len(self.asked)} questions {source}, {drawn}{penalty}, at most {s.max_new_tokens} new tokens, "
            f"the model's own chat template, no examples in the prompt; {compared}; {self._measured}"
        )

    def _page(self, scores: dict[str, Any], before: Sequence[Answer], after: Sequence[Answer]) -> None:
        page = Page(f"Answers of {self.out.name}, before and after")
        page.text(self._protocol(scores["after"]))
        if "warning" in scores["after"]:
            page.text(scores["after"]["warning"], note=True)
        page.table(["", "before", "after"], rows_of(scores["before"], scores["after"]))
        for q, b, a in list(zip(self.asked, before, after, strict=True))[:SHOWN]:
            page.heading(q.messages[-1]["content"][:300])
            marks = ["" if answer.stopped else " (did not stop)" for answer in (b, a)]
            page.table(["reference", f"before{marks[0]}", f"after{marks[1]}"], [[q.reference, b.text, a.text]])
        page.write(self.out / "answers.html")


def rows_of(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Every number of two scores side by side."""
    found = []
    for key, value in before.items():
        if isinstance(value, dict):
            found += rows_of(value, after[key], f"{prefix}{key} ")
        elif isinstance(value, int | float):
            found.append([f"{prefix}{key}", f"{value:.4g}", f"{after[key]:.4g}"])
    return found
