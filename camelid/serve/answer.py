"""From a request's fields to texts on their way, and from those to what is told of them."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from camelid.errors import CamelidError, InputError
from camelid.generate.constrain import Form
from camelid.generate.engine import Engine, PromptTooLong
from camelid.generate.sampling import SamplingParams, TokenLogprob, nth
from camelid.serve.faults import Fault
from camelid.serve.limits import Limits
from camelid.serve.metrics import Metrics
from camelid.serve.requests import Sampling
from camelid.serve.worker import Progress, Ticket, Worker
from camelid.tokenizer.template_child import Ended
from camelid.tokenizer.tokenizer import Tokenizer

CONTEXTS = 16  # worth of tokens that one request may ask for
LEAST_LOGPROB = -9999.0  # what stands for minus infinity, which JSON does not have


@dataclass
class Call:
    """What a request's handler needs: who asks, and with whom it deals."""

    engine: Engine
    worker: Worker
    limits: Limits
    metrics: Metrics
    names: dict[str, str | None]  # a model's name -> the adapter that it is
    longest_token: int  # characters
    control_tokens: bool = False  # whether a text may spell them, outside of conversations
    templates: Executor | None = None  # where chat templates run: a slow one is waited for there, and nowhere else
    caller: str = ""
    request_id: str = ""
    told: dict[str, Any] = field(default_factory=dict)  # for the log

    def adapter(self, model: str) -> str | None:
        if model not in self.names:
            known = ", ".join(self.names)
            raise Fault(404, f"there is no model of that name; there are: {known}", "model", "model_not_found")
        self.told["model"] = model
        return self.names[model]

    def encode(self, text: str) -> list[int]:
        """Ids of a text that is no conversation."""
        return self.tokenizer.encode_prompt(text, parse_special=self.control_tokens)

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.engine.tokenizer is not None
        return self.engine.tokenizer


def sampling_of(
    request: Sampling, call: Call, max_tokens: int | None, logprobs: int | None = None, form: Form | None = None
) -> SamplingParams:
    """The request's wishes. Without a temperature it is 1, OpenAI's default."""
    return SamplingParams(
        max_new_tokens=max_tokens if max_tokens is not None else call.engine.context_length,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=request.top_k or 0,
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        typical_p=request.typical_p or 1.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_biases(request),
        seed=None if request.seed is None else request.seed % 2**63,
        stop=request.stop or (),
        logprobs=logprobs,
        adapter=call.adapter(request.model),
        lookup=request.lookup or 0,
        form=form,
    )


def _biases(request: Sampling) -> dict[int, float]:
    biases = request.logit_bias or {}
    bad = next((key for key in biases if not (key.isascii() and key.isdecimal() and len(key) < 10)), None)
    if bad is not None:
        raise Fault(400, "logit_bias: its keys are token ids", "logit_bias", "invalid_value")
    return {int(key): value for key, value in biases.items()}


class Answers:
    """The texts of one request: n of each prompt. Used as a context: leaving it ends those that still run."""

    def __init__(self, call: Call, prompts: Sequence[list[int]], params: SamplingParams, n: int) -> None:
        self.call, self.prompts, self.params, self.n = call, prompts, params, n
        self.tickets: list[Ticket] = []

    async def __aenter__(self) -> Answers:
        call = self.call
        self._check_cost()
        with held(call, len(self.prompts) * self.n):
            sequences = await asyncio.to_thread(self._prepared)
            self.tickets = [call.worker.add(sequence) for sequence in sequences]
        call.told["prompt_tokens"] = self.prompt_tokens
        return self

    async def __aexit__(self, *_: object) -> None:
        for ticket in self.tickets:
            self.call.worker.drop(ticket)
        self.call.told["completion_tokens"] = self.completion_tokens
        failed = next((t.progress.error for t in self.tickets if t.progress.error), None)
        if failed:  # the caller is not told why
            self.call.told["error"] = failed
        self.call.metrics.texts(self.prompt_tokens, self.tickets)

    def _check_cost(self) -> None:
        """One request may ask for a few contexts' worth of tokens, however it divides them."""
        context = self.call.engine.context_length
        new = self.params.max_new_tokens or context
        texts, queue = self.n * len(self.prompts), self.call.limits.queue
        if texts > queue:
            raise Fault(400, f"n and prompts together ask for {texts} texts; the server takes {queue} at a time", "n",
                        "request_too_large")  # fmt: skip
        cost, most = sum(self.n * min(len(prompt) + new, context) for prompt in self.prompts), CONTEXTS * context
        if cost > most:
            told = f"n, prompts and max_tokens together ask for up to {cost:,} tokens; a request may ask for {most:,}"
            raise Fault(400, told, "max_tokens", "request_too_large")

    def _prepared(self) -> list[Any]:
        made = []
        for prompt in self.prompts:
            for number in range(self.n):
                try:
                    made.append(self.call.engine.prepare(prompt, nth(self.params, number), self.call.caller))
                except PromptTooLong as error:
                    raise Fault(400, str(error), "prompt", "context_length_exceeded") from None
                except InputError as error:
                    raise Fault(400, str(error), code="invalid_value") from None
        return made

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def completion_tokens(self) -> int:
        return sum(ticket.progress.tokens for ticket in self.tickets)

    def usage(self) -> dict[str, int]:
        prompt, new = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    async def whole(self) -> list[Progress]:
        """All texts when they have ended."""
        done = []
        for ticket in self.tickets:
            progress = ticket.progress
            while progress.finish is None:
                progress = await ticket.after(progress)
            done.append(checked(progress))
        return done

    async def news(self) -> AsyncIterator[tuple[int, Progress, Progress]]:
        """(number of the text, what was known, what is known now) as it comes, from all texts, until all have ended."""
        seen = [Progress()] * len(self.tickets)  # what came before anyone asked is news, too
        waits = {asyncio.create_task(t.after(seen[i])): i for i, t in enumerate(self.tickets)}
        try:
            while waits:
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    number = waits.pop(task)
                    before, seen[number] = seen[number], checked(task.result())
                    yield number, before, seen[number]
                    if seen[number].finish is None:
                        waits[asyncio.create_task(self.tickets[number].after(seen[number]))] = number
        finally:
            for task in waits:
                task.cancel()


@contextmanager
def held(call: Call, texts: int) -> Iterator[None]:
    """Places in the queue while what takes them is made ready. Raises Fault when there are none."""
    if call.worker.pending + texts > call.limits.queue:
        raise Fault(429, "too many texts are waiting; ask again", code="queue_full", retry_after=5)
    call.worker.reserved += texts
    try:
        yield
    finally:
        call.worker.reserved -= texts


def checked(progress: Progress) -> Progress:
    """Raises Fault for a text that failed or was ended by the server."""
    if progress.finish == "error":
        raise Fault(500, "the text could not be finished", code="generation_failed")
    if progress.finish == "cancelled":
        raise Fault(503, "the server is shutting down", code="shutting_down")
    return progress


def finish_reason(progress: Progress) -> str | None:
    """OpenAI's word."""
    if progress.finish is None:
        return None
    return "length" if progress.finish in ("max_new_tokens", "max_length") else "stop"


def token_entries(tokenizer: Tokenizer, found: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """OpenAI's `logprobs.content`, with each token's id added."""
    return [
        {**_entry(tokenizer, one.token, one.logprob), "top_logprobs": [_entry(tokenizer, *pair) for pair in one.top]}
        for one in found
    ]


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    text = data.decode("utf-8", "replace")
    return {"token": text, "logprob": finite(logprob), "bytes": list(data), "token_id": token}


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB) if not math.isnan(logprob) else LEAST_LOGPROB


def shown_tokens(progress: Progress) -> int:
    """How many of its tokens are part of the answer: the end token is not."""
    return progress.tokens - (progress.finish == "eos")


def check_size(call: Call, sizes: Sequence[int], field: str) -> None:
    """Refuse what cannot fit before it is cut into tokens, which takes a while: prompts of so many characters. Raises
    Fault."""
    context = call.engine.context_length
    if max(sizes, default=0) > context * call.longest_token:
        told = f"the prompt has {max(sizes):,} characters; a context of {context:,} tokens holds fewer"
        raise Fault(400, told, field, "context_length_exceeded")
    if sum(sizes) > CONTEXTS * context * call.longest_token:
        told = f"the prompts have {sum(sizes):,} characters in all; a request may have {CONTEXTS * context:,} tokens"
        raise Fault(400, told, field, "request_too_large")


async def by_template(call: Call, function: Callable[..., list[int]], *arguments: Any) -> list[int]:
    """What needs the chat template, in the threads that are kept for it."""
    return await asyncio.get_running_loop().run_in_executor(call.templates, partial(function, *arguments))


def rendered(call: Call, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None) -> list[int]:
    """Ids of a conversation. Raises Fault when the model's template refuses it, or there is none."""
    size = sum(len(json.dumps(one, ensure_ascii=False)) for one in [*messages, *(tools or [])])
    check_size(call, [size], "messages")
    if (adapter := call.names.get(call.told.get("model", ""))) in call.engine.other_templates:
        told = f"the adapter {adapter} was taught in a chat template that is not its base's: serve its run by itself, "
        raise Fault(400, f"{told}or what camelid merge makes of it", "model", "invalid_value")
    try:
        ids: list[int] = call.tokenizer.apply_chat_template(messages, tools=tools)
    except Ended:
        raise Fault(503, "the server is shutting down", code="shutting_down", retry_after=5) from None
    except CamelidError as error:
        raise Fault(400, str(error), "messages", "invalid_value") from None
    return ids
