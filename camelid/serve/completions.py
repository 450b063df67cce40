"""/v1/completions: how a text goes on."""

from __future__ import annotations

import asyncio
import codecs
import time
import uuid
from collections.abc import Sequence
from typing import Any

from camelid.errors import InputError
from camelid.generate.sampling import mean_logprob
from camelid.serve.answer import Answers, Call, check_size, finish_reason, finite, sampling_of, shown_tokens
from camelid.serve.endpoint import Events
from camelid.serve.faults import Fault
from camelid.serve.requests import CompletionRequest, Prompts, read
from camelid.serve.worker import Progress

DEFAULT_TOKENS = 16  # OpenAI's


async def complete(call: Call, body: dict[str, Any]) -> dict[str, Any] | Events:
    request = read(CompletionRequest, body)
    call.adapter(request.model)
    if request.echo and request.logprobs is not None:
        raise Fault(400, "echo with logprobs is not supported", "echo", "invalid_value")
    prompts = await asyncio.to_thread(prompt_ids, call, request.prompt, "prompt")
    echoes = await asyncio.to_thread(_echoes, call, prompts) if request.echo else [""] * len(prompts)
    n = request.n or 1
    drawn = request.best_of or n
    if drawn < n:
        raise Fault(400, f"best_of is {drawn}, but n asks for {n} texts", "best_of", "invalid_value")
    if request.stream and drawn > n:
        raise Fault(400, "best_of with stream: which text is best is known at the end", "best_of", "invalid_value")
    try:
        compared = 0 if drawn > n else None
        logprobs = compared if request.logprobs is None else request.logprobs
        params = sampling_of(request, call, request.max_tokens or DEFAULT_TOKENS, logprobs)
    except InputError as error:
        raise Fault(400, str(error), code="invalid_value") from None
    answers = Answers(call, prompts, params, drawn)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
        "model": request.model,
    }  # fmt: skip
    if request.stream:
        return _chunks(answers, request, echoes, head)
    async with answers:
        done = await answers.whole()
        choices = [
            _choice(answers, request, ticket, echoes[ticket // drawn] + done[ticket].text, Progress(), done[ticket])
            | {"index": number}
            for number, ticket in enumerate(_best(answers, n))
        ]
        return {**head, "choices": choices, "usage": answers.usage()}


def prompt_ids(call: Call, given: Prompts, field: str) -> list[list[int]]:
    """Ids of one prompt or several, each text or ids. What a text spells is no control token, unless the server says
    that it may be."""
    prompts: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else [*given]
    check_size(call, [len(prompt) for prompt in prompts if isinstance(prompt, str)], field)
    found: list[list[int]] = [call.encode(p) if isinstance(p, str) else p for p in prompts]
    if not all(found):
        raise Fault(400, f"{field} is empty: the model needs at least one token to start from", field, "invalid_value")
    return found


def _echoes(call: Call, prompts: Sequence[list[int]]) -> list[str]:
    bad = next((i for ids in prompts for i in ids if i >= len(call.tokenizer)), None)
    if bad is not None:
        raise Fault(
            400, f"token id {bad} is outside the vocabulary of {len(call.tokenizer)}", "prompt", "invalid_value"
        )
    return [call.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts]


def _best(answers: Answers, n: int) -> list[int]:
    """The numbers of each prompt's n best texts; of as many as there are, all in order."""
    if n == answers.n:
        return list(range(len(answers.tickets)))
    found: list[int] = []
    for first in range(0, len(answers.tickets), answers.n):
        numbers = range(first, first + answers.n)
        scores = {i: mean_logprob(answers.tickets[i].sequence.logprobs) for i in numbers}
        found += sorted(numbers, key=lambda i: -scores[i])[:n]
    return found


async def _chunks(answers: Answers, request: CompletionRequest, echoes: Sequence[str], head: dict[str, Any]) -> Events:
    usage = bool(request.stream_options and request.stream_options.include_usage)
    head = {**head, **({"usage": None} if usage else {})}
    async with answers:
        places = [_Places() for _ in answers.tickets]
        for number in range(len(answers.tickets)) if request.echo else ():
            text = echoes[number // answers.n]
            yield {**head, "choices": [{"index": number, "text": text, "logprobs": None, "finish_reason": None}]}
        async for number, before, now in answers.news():
            choice = _choice(answers, request, number, now.text[len(before.text) :], before, now, places[number])
            if choice["text"] or choice["finish_reason"] or choice["logprobs"]:
                yield {**head, "choices": [choice]}
        if usage:
            yield {**head, "choices": [], "usage": answers.usage()}


def _choice(
    answers: Answers, request: CompletionRequest, number: int, text: str, before: Progress, now: Progress,
    places: _Places | None = None,
) -> dict[str, Any]:  # fmt: skip
    logprobs = None if request.logprobs is None else _logprobs(answers, number, before, now, places or _Places())
    return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish_reason(now)}


class _Places:
    """Where each token of one text begins in it, in characters: of a character's tokens, where it does."""

    def __init__(self) -> None:
        self._characters, self._at = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def next(self, raw: bytes) -> int:
        begins = self._at
        self._at += len(self._characters.decode(raw))
        return begins


def _logprobs(answers: Answers, number: int, before: Progress, now: Progress, places: _Places) -> dict[str, Any]:
    tokenizer = answers.call.tokenizer
    found = answers.tickets[number].logprobs(before.tokens, shown_tokens(now))

    def text(token: int) -> str:
        """OpenAI's way with a token that is a part of a character."""
        raw = tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    return {
        "tokens": [text(one.token) for one in found],
        "token_logprobs": [finite(one.logprob) for one in found],
        "top_logprobs": [{text(token): finite(logprob) for token, logprob in one.top} for one in found],
        "text_offset": [places.next(tokenizer.token_bytes(one.token)) for one in found],
    }
