"""Questions that a model answers in its own words: asked in batches, scored by number, text, BLEU, ROUGE or a program's
tests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camelid.errors import InputError
from camelid.evaluate.bleu import bleu
from camelid.evaluate.opened import measured_in
from camelid.evaluate.programs import pass_at_k, passes
from camelid.evaluate.rouge import rouge
from camelid.evaluate.templates import read_rows, read_template, template_label
from camelid.generate.engine import Engine, Result
from camelid.generate.sampling import SamplingParams
from camelid.report.progress import progress

NUMBER = re.compile(r"-?(?:\d[\d,]*\.?\d*|\.\d+)")
METRICS = ("number", "exact", "bleu", "rouge", "code")
AT_ONCE = 16  # questions answered together
OPTIONAL = {"stop": list, "max_new_tokens": int, "chat": bool, "extract": str, "tokenize": str, "tests": str}


@dataclass(frozen=True)
class Asked:
    """A prompt, the data's answer, and for a program what tests it."""

    prompt: str
    reference: str
    tests: str = ""


@dataclass(frozen=True)
class AnswerTask:
    """How a task asks and scores. `extract` is a pattern whose first group, at its last match, is the answer in a
    text; `chat` puts the prompt as a user's turn into the model's own template."""

    name: str
    prompt: str
    reference: str
    metric: str
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    chat: bool = False
    extract: str | None = None
    tokenize: str = "13a"
    tests: str = ""
    label: str = ""


def read_answer_task(name: str) -> AnswerTask:
    """A task whose answers are written: see `templates.read_template`. Raises InputError for an unknown metric or a
    pattern that is none."""
    found = read_template(name, ("prompt", "reference", "metric"), OPTIONAL)
    if found["metric"] not in METRICS:
        raise InputError(f"{name}: metric {found['metric']!r} is none of {', '.join(METRICS)}")
    try:
        groups = re.compile(found.get("extract", "()")).groups
    except re.error as error:
        raise InputError(f"{name}: extract is no pattern: {error}") from None
    if groups < 1:
        raise InputError(f"{name}: extract has no group: put what is the answer into parentheses")
    stop = tuple(str(s) for s in found.pop("stop", ()))
    return AnswerTask(Path(name).stem, stop=stop, label=template_label(name), **found)


def asked_of(path: Path, task: AnswerTask) -> list[Asked]:
    """The questions of a .jsonl file. Raises InputError naming the line and the field that it lacks."""

    def make(row: Mapping[str, Any]) -> Asked:
        if not isinstance(row, Mapping):
            raise TypeError("a row is an object")
        said = {key: value for key, value in row.items() if value is not None}
        return Asked(task.prompt.format(**said), task.reference.format(**said), task.tests.format(**said))

    return read_rows(path, make, f"a row that the task {task.name} can fill its prompt with")


def answers(
    engine: Engine,
    task: AnswerTask,
    asked: Sequence[Asked],
    *,
    shots: Sequence[Asked] = (),
    samples: int = 1,
    temperature: float = 0.0,
    execute: bool = False,
    quiet: bool = True,
) -> dict[str, Any]:
    """Returns the metric's figures, `stopped_by_itself` (the share of texts that the model ended), `questions`,
    `answers` (each question, its reference, what the model wrote and whether it is right) and the protocol. `samples`
    texts are drawn of each question, for pass@k. Raises InputError before anything runs when programs are to be tested
    and `execute` was not given."""
    check(task, samples, temperature, execute)
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    if task.chat and not tokenizer.chat_template:
        raise InputError(f"the task {task.name} asks in the model's chat template, and the model has none")
    before = "".join(f"{q.prompt}{q.reference}\n\n" for q in shots)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": before + q.prompt}])
        if task.chat
        else tokenizer.encode_prompt(before + q.prompt, parse_special=False)
        for q in asked
    ]
    _fits(engine, task, prompts)
    if task.metric in ("bleu", "rouge"):  # a wrong tokenizer or a missing package is told before the work
        scores(task.metric, [q.reference for q in asked[:2]], [q.reference for q in asked[:2]], task.tokenize)
    texts, ends = _written(engine, task, prompts, samples, temperature, quiet)
    figures, right = score(task, texts, asked, samples)
    how = "greedy" if temperature == 0 else f"{samples} samples at temperature {temperature:g}, seeds 0 …"
    form = "the model's chat template" if task.chat else "no chat template"
    form += f", cut before {' or '.join(map(repr, task.stop))}" if task.stop else ""
    compared = explained(task.metric, task.extract)
    if "protocol" in figures:  # BLEU's signature, ROUGE's tokenizer and stemmer
        compared += f" ({figures['protocol']})"
    return figures | {
        "stopped_by_itself": sum(ends) / len(ends),
        "questions": len(asked),
        "samples": samples,
        "answers": [
            {"question": q.prompt, "reference": q.reference, "answer": texts[n * samples], "right": right[n]}
            for n, q in enumerate(asked)
        ],
        "protocol": (
            f"task {task.label}: {len(asked)} questions, {len(shots)} shots, {how}, at most "
            f"{task.max_new_tokens} new tokens, {form}, {compared}, "
            f"{measured_in(engine.model, tokenizer)}"
        ),
    }  # fmt: skip


def _fits(engine: Engine, task: AnswerTask, prompts: Sequence[Sequence[int]]) -> None:
    """Raise InputError for a question that leaves no room for an answer: it would be cut, and scored."""
    longest = max(range(len(prompts)), key=lambda n: len(prompts[n]))
    needed, context = len(prompts[longest]) + task.max_new_tokens, engine.context_length
    if needed > context:
        raise InputError(
            f"question {longest + 1} needs {needed} tokens with max_new_tokens {task.max_new_tokens} of the task "
            f"{task.name}, the model takes {context}: fewer --shots, or a smaller max_new_tokens"
        )


def check(task: AnswerTask, samples: int, temperature: float, execute: bool) -> None:
    """Raise InputError when programs would be run without leave, or several texts asked for that would be one."""
    if task.metric == "code" and not execute:
        raise InputError(
            f"the task {task.name} runs what the model writes, as a process of yours with limits on time, memory and "
            "files, which is no jail: give --execute if that is what you want"
        )
    if samples < 1 or (samples > 1 and (task.metric != "code" or temperature == 0)):
        raise InputError(f"--samples {samples}: several are for programs, with a --temperature above 0")


def _written(
    engine: Engine, task: AnswerTask, prompts: Sequence[Sequence[int]], samples: int, temperature: float, quiet: bool
) -> tuple[list[str], list[bool]]:
    """Every question's texts, one after the other, and whether the model ended each, not the task's `stop`."""
    each = [
        SamplingParams(max_new_tokens=task.max_new_tokens, temperature=temperature, seed=seed, stop=task.stop)
        for seed in range(samples)
    ]
    asked = [prompt for prompt in prompts for _ in each]
    found = in_batches(engine, asked, each * len(prompts), [len(p) for p in asked], "answers", quiet)
    return [r.text for r in found], [r.finish_reason == "eos" for r in found]


def in_batches(
    engine: Engine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], lengths: Sequence[int],
    label: str, quiet: bool,
) -> list[Result]:  # fmt: skip
    """Complete every prompt by its own params, like `lengths` together: a batch is done when its longest is."""
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    found: dict[int, Result] = {}
    with progress(label, len(order), quiet) as advance:
        for first in range(0, len(order), AT_ONCE):
            part = order[first : first + AT_ONCE]
            results = engine.generate([prompts[n] for n in part], [params[n] for n in part])
            found |= dict(zip(part, results, strict=True))
            advance(first + len(part))
    return [found[n] for n in range(len(prompts))]


def score(
    task: AnswerTask, texts: Sequence[str], asked: Sequence[Asked], samples: int
) -> tuple[dict[str, Any], list[bool | None]]:
    """The metric over all texts, and of each question whether (its first text) is right, where that can be said."""
    if task.metric == "code":
        programs = [_program(task, asked[i // samples].prompt, text) for i, text in enumerate(texts)]
        good = [p is not None and passes(p, asked[i // samples].tests) for i, p in enumerate(programs)]
        solved = [sum(good[n * samples : (n + 1) * samples]) for n in range(len(asked))]
        ks = [k for k in (1, 10, 100) if k <= samples]
        mean = {f"pass@{k}": sum(pass_at_k(samples, c, k) for c in solved) / len(solved) for k in ks}
        return mean, [good[n * samples] for n in range(len(asked))]
    # A reference may be the bare answer, without the words that lead up to it.
    references = [extracted(task, q.reference) or q.reference.strip() for q in asked]
    return scores(task.metric, [extracted(task, text) for text in texts], references, task.tokenize)


def scores(
    metric: str, texts: Sequence[str | None], references: Sequence[str], tokenize: str = "13a"
) -> tuple[dict[str, Any], list[bool | None]]:
    """number and exact: `accuracy` and `right`; bleu and rouge: their own figures. And of each text whether it is
    right, None where there is no right and wrong. A text that is None holds no answer, and is wrong."""
    given = [text or "" for text in texts]
    if metric == "bleu":
        return bleu(given, [references], tokenize=tokenize, ter=False), [None] * len(texts)
    if metric == "rouge":
        return rouge(given, [references], tokenize="words" if tokenize == "13a" else tokenize), [None] * len(texts)
    same = same_number if metric == "number" else same_text
    right: list[bool | None] = [
        text is not None and same(text, reference) for text, reference in zip(texts, references, strict=True)
    ]
    count = sum(map(bool, right))
    return {"accuracy": count / len(right), "right": count}, right


def extracted(task: AnswerTask, text: str) -> str | None:
    """What of a text is the answer: what the pattern finds last, or all of it without one; None for nothing found."""
    if task.extract is None:
        return text.strip()
    found = [match.group(1) for match in re.finditer(task.extract, text) if match.group(1) is not None]
    return found[-1].strip() if found else None


def _program(task: AnswerTask, prompt: str, text: str) -> str | None:
    """What runs: the prompt with what was written after it, or the program in the answer."""
    return prompt + text if task.extract is None else extracted(task, text)


def explained(metric: str, extract: str | None = None) -> str:
    """How a metric compares, and what of an answer."""
    how = {
        "number": "the last number of answer and reference, commas removed",
        "exact": "equal texts, trimmed",
        "code": "the program passes its tests, pass@k by the unbiased estimate",
    }
    told = how.get(metric, f"{metric} of the answer")
    return f"{told}, of what {extract!r} finds last" if extract else told


def last_number(text: str) -> str | None:
    """The last number of a text without its commas and closing zeros; None without one."""
    found = NUMBER.findall(text)
    if not found:
        return None
    digits: str = found[-1].replace(",", "").rstrip(".")
    digits = re.sub(r"^(-?)\.", r"\g<1>0.", digits)
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def same_number(text: str, reference: str) -> bool:
    """Whether both end in the same number."""
    wanted = last_number(reference)
    return wanted is not None and last_number(text) == wanted


def same_text(text: str, reference: str) -> bool:
    """Whether both are the same, spaces around aside."""
    return text.strip() == reference.strip()
