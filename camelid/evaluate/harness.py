"""Any task of EleutherAI's lm-evaluation-harness on a camelid model (extra: harness)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from camelid.errors import InputError, MissingExtra
from camelid.evaluate.choice import Encoded, read_row, rows
from camelid.evaluate.opened import check_finite, measured_in
from camelid.evaluate.perplexity import Cut, score
from camelid.evaluate.texts import Text
from camelid.generate.engine import Engine
from camelid.generate.sampling import SamplingParams
from camelid.model.llama import Llama
from camelid.report.progress import progress
from camelid.tokenizer.tokenizer import Tokenizer


def harness(
    model: Llama, tokenizer: Tokenizer, tasks: Sequence[str], include: str | None = None, shots: int | None = None,
    limit: int | None = None, quiet: bool = True, stops: Sequence[int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run lm-eval's tasks by name; `stops` are the ids that end a text. Returns its `results`, their `samples` and the
    protocol. Raises InputError for a task it does not know."""
    try:
        import lm_eval
        from lm_eval.api.model import LM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingExtra("lm-eval", "harness", "evaluate harness") from None

    class Adapted(LM):  # type: ignore[misc]
        """A camelid model as lm-eval asks for one."""

        def loglikelihood(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return loglikelihood(model, tokenizer, [r.args for r in requests], quiet)

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> list[float]:
            return rolling(model, tokenizer, [r.args[0] for r in requests], quiet)

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            return generate_until(model, tokenizer, [r.args for r in requests], stops)

    manager = TaskManager(include_path=include)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise InputError(f"--tasks: lm-eval has no task {unknown[0]!r}: give --include a folder with its file")
    found = lm_eval.simple_evaluate(
        Adapted(), tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=0
    )
    return {
        "results": found["results"],
        "samples": json.loads(json.dumps(found["samples"], default=_plain)),
        "protocol": (
            f"lm-eval {lm_eval.__version__}, {_shots(found)} examples in the prompt, "
            f"{'all' if limit is None else f'at most {limit}'} questions of a task, {measured_in(model, tokenizer)}"
        ),
    }


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays, which some metrics leave in a sample, as JSON has them."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _shots(found: Mapping[str, Any]) -> str:
    """How many examples each task had, as lm-eval tells."""
    by_task: Mapping[str, int] = found["n-shot"]
    if len(set(by_task.values())) == 1:
        return str(next(iter(by_task.values())))
    return ", ".join(f"{count} ({name})" for name, count in by_task.items())


def loglikelihood(
    model: Llama, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], quiet: bool = True
) -> list[tuple[float, bool]]:
    """log p(continuation | context) of every pair, and whether each of its tokens is the likeliest. Continuations of
    one context that follow each other are read in one row."""
    encoded = [(context, *encode_pair(tokenizer, context, continuation)) for context, continuation in pairs]
    groups: list[Encoded] = []
    last: str | None = None
    for context, prompt, answer in encoded:
        room = model.config.max_position_embeddings
        if not answer:
            raise InputError(f"after {context[-40:]!r} there is no token of the continuation left to score")
        prompt, answer = _fitting(prompt, answer, room)
        if groups and context == last and groups[-1].prompt == prompt:
            groups[-1].answers.append(answer)
        else:
            groups.append(Encoded(prompt, [answer]))
        last = context
    found: list[tuple[float, bool]] = []
    with progress("log-likelihoods", len(groups), quiet) as advance:
        done = 0
        for row in rows(groups, model.device):
            read = read_row(model, [groups[n] for n in row])
            with torch.inference_mode():
                logits = model.lm_head(read.states)
                sums = read.sums(logits.float().log_softmax(-1).gather(1, read.tokens[:, None])[:, 0])
                other = read.sums((logits.argmax(-1) != read.tokens).long())
            check_finite(sums, "a text")
            found += [(total, missed == 0) for total, missed in zip(sums, other, strict=True)]
            done += len(row)
            advance(done)
    return found


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """As lm-eval's own models cut: spaces at the context's end belong to the continuation, the tokens of both together
    are cut where the context's own end, and an empty context is BOS or EOS."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        first = _first(tokenizer)
        ids = tokenizer.encode(continuation, add_special_tokens=False, parse_special=False)
        return [first if first is not None else 0], list(ids)
    whole = tokenizer.encode_prompt(context + continuation, parse_special=False)
    size = len(tokenizer.encode_prompt(context, parse_special=False))
    return whole[:size], whole[size:]


def _first(tokenizer: Tokenizer) -> int | None:
    """What stands before a text by itself: BOS, else EOS."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def _fitting(prompt: list[int], answer: list[int], room: int) -> tuple[list[int], list[int]]:
    """The end of the two together that the model can read; the last token is only predicted. Raises InputError for an
    answer that is longer than that by itself, as lm-eval's own models refuse it."""
    if len(answer) > room:
        raise InputError(f"an answer of {len(answer)} tokens is to be scored, and the model's context is {room}")
    over = len(prompt) + len(answer) - 1 - room
    return prompt[max(0, over) :], answer


def rolling(model: Llama, tokenizer: Tokenizer, texts: Sequence[str], quiet: bool = True) -> list[float]:
    """log p of every whole text, in lm-eval's windows, BOS (or EOS) before it."""
    first = _first(tokenizer)
    window = model.config.max_position_embeddings
    ids = tokenizer.encode_documents(list(texts))
    named = [Text(f"text {n}", text, list(i)) for n, (text, i) in enumerate(zip(texts, ids, strict=True), 1)]
    return [-scored.total for scored in score(model, named, Cut(window, window, full_end=True), first, quiet=quiet)]


def generate_until(
    model: Llama, tokenizer: Tokenizer, asked: Sequence[tuple[str, dict[str, Any]]], stops: Sequence[int] | None = None
) -> list[str]:
    """What the model writes after each context, up to a stop string: greedily unless the task says otherwise. Of a
    context that leaves no room the beginning is cut off, as lm-eval's own models do. A task that asks the same several
    times gets as many texts, drawn by the seeds 0, 1, 2, … Raises InputError for a task that leaves no room at all."""
    engine = Engine(model, tokenizer, stops)
    prompts, params = [], []
    times = Counter[str]()
    for context, how in asked:
        new, drawn = int(how.get("max_gen_toks", 256)), dict[str, Any]()
        if how.get("do_sample"):
            heat, top_p, top_k = (how.get(name) for name in ("temperature", "top_p", "top_k"))
            drawn = {"temperature": 1.0 if heat is None else float(heat), "top_p": float(top_p or 1.0),
                     "top_k": max(0, int(top_k or 0)), "seed": times[context]}  # fmt: skip
            times[context] += 1
        if new >= engine.context_length:
            raise InputError(
                f"a task asks for {new} new tokens, and the model's context is {engine.context_length}: there is no "
                "room for a question"
            )
        room = engine.context_length - new
        prompts.append(tokenizer.encode_prompt(context, parse_special=False)[-room:])
        params.append(SamplingParams(new, stop=how.get("until") or (), **drawn))
    return [r.text for r in engine.generate(prompts, params)]
