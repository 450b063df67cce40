"""/v1/chat/completions: a conversation's next message, whole or as it comes, as text or as a call of a function."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from camelid.disk import is_json
from camelid.errors import InputError
from camelid.generate.constrain import Form
from camelid.serve import tools
from camelid.serve.answer import (
    Answers,
    Call,
    by_template,
    checked,
    finish_reason,
    rendered,
    sampling_of,
    shown_tokens,
    token_entries,
)
from camelid.serve.endpoint import Events
from camelid.serve.faults import Fault
from camelid.serve.requests import ChatRequest, SchemaFormat, Tool, read
from camelid.serve.worker import Progress


async def chat(call: Call, body: dict[str, Any]) -> dict[str, Any] | Events:
    request = read(ChatRequest, body)
    call.adapter(request.model)  # an unknown model is told before anything else
    offered = tools.offered(request)
    prompt = await by_template(call, _prompt, call, request, offered)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    if request.top_logprobs is not None and not request.logprobs:
        raise Fault(400, "top_logprobs needs logprobs to be true", "top_logprobs", "invalid_value")
    most = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    try:
        form = _form(request, offered)
        params = sampling_of(request, call, most, logprobs, form)
    except InputError as error:
        raise Fault(400, str(error), code="invalid_value") from None
    if request.begin_with_ids and (offered or form):
        raise Fault(400, "begin_with_ids with tools or response_format: the beginning is not read as a part of them",
                    "begin_with_ids", "invalid_value")  # fmt: skip
    answers = Answers(call, [prompt], params, request.n or 1)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}
    if request.stream:
        return _chunks(answers, request, offered, head)
    async with answers:
        done = await answers.whole()
        choices = [_choice(answers, request, offered, n, progress) for n, progress in enumerate(done)]
        return {**head, "object": "chat.completion", "choices": choices, "usage": answers.usage()}


def _prompt(call: Call, request: ChatRequest, offered: Sequence[Tool]) -> list[int]:
    template = call.tokenizer.chat_template or ""
    told = tools.messages(request.messages, offered, template)
    described = [tool.model_dump(exclude_none=True) for tool in offered] if tools.tools_known(template) else None
    return rendered(call, told, described or None) + list(request.begin_with_ids or [])


def _form(request: ChatRequest, offered: Sequence[Tool]) -> Form | None:
    if offered and tools.demanded(request):
        return tools.form(offered)
    wanted = request.response_format
    if isinstance(wanted, SchemaFormat):
        return Form("json_schema", json.dumps(wanted.json_schema.schema_))
    return Form("json_schema", '{"type": "object"}') if wanted and wanted.type == "json_object" else None


def _choice(
    answers: Answers, request: ChatRequest, offered: Sequence[Tool], number: int, progress: Progress
) -> dict[str, Any]:
    said, called = _read(request, offered, progress.text)
    reason = _reason(called, finish_reason(progress))
    if not called and tools.demanded(request) and (begun := tools.begun_call(progress.text, ended=True)):
        said, called = "", [begun]  # cut off: as much of the call as came, and why it ended
    message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
    if called:
        made = [{"id": _call_id(), "type": "function", "function": vars(one)} for one in called]
        message |= {"content": said or None, "tool_calls": made}
    logprobs = None
    if request.logprobs:
        found = answers.tickets[number].logprobs(0, shown_tokens(progress))
        logprobs = {"content": token_entries(answers.call.tokenizer, found), "refusal": None}
    return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": reason}


def _read(request: ChatRequest, offered: Sequence[Tool], text: str) -> tuple[str, list[tools.FunctionCall]]:
    return tools.read_calls(text, offered, request.parallel_tool_calls is False) if offered else (text, [])


def _reason(calls: Sequence[object], reason: str | None) -> str | None:
    """Of an answer that calls, why it ended. One that was cut off may have lost a call."""
    return "tool_calls" if calls and reason != "length" else reason


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


async def _chunks(answers: Answers, request: ChatRequest, offered: Sequence[Tool], head: dict[str, Any]) -> Events:
    usage = bool(request.stream_options and request.stream_options.include_usage)
    head = {**head, "object": "chat.completion.chunk", **({"usage": None} if usage else {})}
    async with answers:
        writers = [_Writer(request, offered) for _ in answers.tickets]
        for number in range(len(writers)):
            yield {**head, "choices": [_delta(number, {"role": "assistant", "content": ""})]}
        async for number, before, now in answers.news():
            logprobs = None
            if request.logprobs:
                found = answers.tickets[number].logprobs(before.tokens, shown_tokens(now))
                logprobs = {"content": token_entries(answers.call.tokenizer, found), "refusal": None}
            deltas, reason = writers[number].deltas(now)
            if logprobs and logprobs["content"] and not deltas:
                deltas = [{"content": ""}]
            for delta in deltas:
                yield {**head, "choices": [_delta(number, delta, logprobs)]}
                logprobs = None
            if reason is not None:
                yield {**head, "choices": [_delta(number, {}, None, reason)]}
        if usage:
            yield {**head, "choices": [], "usage": answers.usage()}


def _delta(
    number: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _whole_call(number: int, call: tools.FunctionCall) -> dict[str, Any]:
    return {"tool_calls": [{"index": number, "id": _call_id(), "type": "function", "function": vars(call)}]}


class _Writer:
    """What of one text was told already."""

    def __init__(self, request: ChatRequest, offered: Sequence[Tool]) -> None:
        self._request, self._offered, self._demanded = request, offered, tools.demanded(request)
        self._text = 0
        self._id: str | None = None
        self._arguments = 0

    def deltas(self, now: Progress) -> tuple[list[dict[str, Any]], str | None]:
        """The changes to tell, and why the text ended if it has."""
        reason = finish_reason(checked(now))
        if self._demanded:
            called = tools.begun_call(now.text, ended=now.finish is not None)
            complete = now.finish in ("stop", "eos") and called is not None and is_json(called.arguments)
            return self._of_call(called), "tool_calls" if complete else reason
        said, found = now.text, list[tools.FunctionCall]()
        if reason is not None:
            said, found = _read(self._request, self._offered, now.text)
        elif self._offered:
            said = said[: tools.certain_text(said)]
        calls = [_whole_call(number, call) for number, call in enumerate(found)]
        fresh, self._text = said[self._text :], len(said)
        return [*([{"content": fresh}] if fresh else []), *calls], _reason(calls, reason)

    def _of_call(self, called: tools.FunctionCall | None) -> list[dict[str, Any]]:
        if called is None:
            return []
        told = []
        if self._id is None:
            self._id = _call_id()
            function = {"name": called.name, "arguments": ""}
            told.append({"tool_calls": [{"index": 0, "id": self._id, "type": "function", "function": function}]})
        fresh, self._arguments = called.arguments[self._arguments :], max(self._arguments, len(called.arguments))
        return [*told, *([{"tool_calls": [{"index": 0, "function": {"arguments": fresh}}]}] if fresh else [])]
