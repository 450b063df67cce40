"""The smaller routes: embeddings, responses, tokenize."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from collections.abc import Generator
from functools import partial
from typing import Any

import torch

from camelid.errors import CamelidError, InputError
from camelid.generate.constrain import Form
from camelid.generate.sampling import SamplingParams
from camelid.serve import tools
from camelid.serve.answer import CONTEXTS, Answers, Call, by_template, check_size, held, rendered
from camelid.serve.completions import prompt_ids
from camelid.serve.endpoint import Events
from camelid.serve.faults import Fault
from camelid.serve.requests import EmbeddingRequest, ResponseFormat, ResponseRequest, TokenizeRequest, read
from camelid.serve.worker import Progress


async def embed(call: Call, body: dict[str, Any]) -> dict[str, Any]:
    """/v1/embeddings: the mean of each text's last states, of length 1."""
    request = read(EmbeddingRequest, body)
    adapter = call.adapter(request.model)
    texts = await asyncio.to_thread(prompt_ids, call, request.input, "input")
    size = request.dimensions or call.engine.config.hidden_size
    if size > call.engine.config.hidden_size:
        raise Fault(400, f"the model has {call.engine.config.hidden_size} dimensions", "dimensions", "invalid_value")
    most = call.engine.context_length
    if any(len(ids) > most for ids in texts):
        raise Fault(400, f"a text is longer than the context of {most} tokens", "input", "context_length_exceeded")
    if sum(map(len, texts)) > CONTEXTS * most:
        told = f"the texts have {sum(map(len, texts)):,} tokens in all; {CONTEXTS * most:,} are read for one request"
        raise Fault(400, told, "input", "request_too_large")
    data = []
    for index, ids in enumerate(texts):
        try:
            with held(call, 1):
                vector = await _vector(call, ids, adapter)
        except InputError as error:
            raise Fault(400, str(error), "input", "invalid_value") from None
        except CamelidError:
            raise Fault(429, "the cache is full; ask again", code="cache_full", retry_after=5) from None
        if request.dimensions is not None:
            vector = torch.nn.functional.normalize(vector[:size], dim=0)
        packed = base64.b64encode(vector.numpy().tobytes()).decode()
        value = packed if request.encoding_format == "base64" else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": value})
    tokens = sum(map(len, texts))
    call.told["prompt_tokens"] = tokens
    call.metrics.texts(tokens, [])
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": usage}


async def _vector(call: Call, ids: list[int], adapter: str | None) -> torch.Tensor:
    """One text's embedding, between the steps of the texts that are being written."""
    rounds = call.engine.embedding(ids, adapter)
    try:
        while (found := await call.worker.do(partial(_round, rounds))) is None:
            pass
        vector: torch.Tensor = found
        return vector
    finally:
        call.worker.later(rounds.close)  # the caller may have left


def _round(rounds: Generator[None, None, torch.Tensor]) -> torch.Tensor | None:
    try:
        next(rounds)
    except StopIteration as end:
        found: torch.Tensor = end.value
        return found
    return None


async def tokenize(call: Call, body: dict[str, Any]) -> dict[str, Any]:
    """/tokenize: ids and their text."""
    request = read(TokenizeRequest, body)
    model = request.model or next(iter(call.names))
    call.adapter(model)
    if (request.text is None) == (request.messages is None):
        raise Fault(400, "give text or messages, one of them", "text", "invalid_value")
    if request.messages is not None:
        told = tools.messages(request.messages, [], call.tokenizer.chat_template or "")
        ids = await by_template(call, rendered, call, told, None)
    else:
        check_size(call, [len(request.text or "")], "text")
        ids = await asyncio.to_thread(call.encode, request.text or "")
    tokens = await asyncio.to_thread(lambda: [call.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids])
    return {
        "model": model,
        "count": len(ids),
        "max_model_len": call.engine.context_length,
        "ids": ids,
        "tokens": tokens,
    }


async def respond(call: Call, body: dict[str, Any]) -> dict[str, Any] | Events:
    """/v1/responses: OpenAI's newer form of a conversation's next message."""
    request = read(ResponseRequest, body)
    if isinstance(request.input, str):
        messages = [{"role": "user", "content": request.input}]
    else:
        messages = [{"role": "system" if m.role == "developer" else m.role, "content": m.text()} for m in request.input]
    if request.instructions is not None:
        messages.insert(0, {"role": "system", "content": request.instructions})
    adapter = call.adapter(request.model)
    if request.tools:
        raise Fault(400, "tools are taken by /v1/chat/completions only", "tools", "unsupported_value")
    try:
        form = _form(request.text.format if request.text else None)
    except InputError as error:
        raise Fault(400, str(error), "text", "invalid_value") from None
    prompt = await by_template(call, rendered, call, messages, None)
    params = SamplingParams(
        max_new_tokens=request.max_output_tokens or call.engine.context_length,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        adapter=adapter,
        form=form,
    )
    answers = Answers(call, [prompt], params, 1)
    head = {"id": f"resp_{uuid.uuid4().hex}", "created_at": int(time.time()), "model": request.model}
    if request.stream:
        return _events(answers, request, head)
    async with answers:
        [now] = await answers.whole()
        return _response(answers, request, head, now)


def _form(wanted: ResponseFormat | None) -> Form | None:
    if wanted is None or wanted.type == "text":
        return None
    schema = wanted.schema_ if wanted.type == "json_schema" else None
    if wanted.type == "json_schema" and schema is None:
        raise InputError("text.format of type json_schema needs a schema")
    return Form("json_schema", json.dumps(schema or {"type": "object"}))


def _response(
    answers: Answers, request: ResponseRequest, head: dict[str, Any], now: Progress, item: str = ""
) -> dict[str, Any]:
    cut = now.finish in ("max_new_tokens", "max_length")
    status = "in_progress" if now.finish is None else "incomplete" if cut else "completed"
    usage = answers.usage()
    counts = {
        "input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"],
        "total_tokens": usage["total_tokens"], "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }  # fmt: skip
    return {
        **head, "object": "response", "status": status, "error": None, "instructions": request.instructions,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None, "metadata": {},
        "output": [_message(now, item)] if now.finish else [], "parallel_tool_calls": False, "tool_choice": "none",
        "tools": [], "temperature": request.temperature, "top_p": request.top_p, "store": False,
        "max_output_tokens": request.max_output_tokens, "usage": counts if now.finish else None,
    }  # fmt: skip


def _message(now: Progress, item: str = "") -> dict[str, Any]:
    content = {"type": "output_text", "text": now.text, "annotations": [], "logprobs": []}
    done = now.finish in ("eos", "stop")
    status = "completed" if done else "incomplete"
    return {"id": item or _item(), "type": "message", "role": "assistant", "status": status, "content": [content]}


def _item() -> str:
    return f"msg_{uuid.uuid4().hex}"


async def _events(answers: Answers, request: ResponseRequest, head: dict[str, Any]) -> Events:
    item, count = _item(), 0

    def numbered(kind: str, **fields: Any) -> dict[str, Any]:
        nonlocal count
        count += 1
        return {"type": f"response.{kind}", "sequence_number": count - 1, **fields}

    place = {"item_id": item, "output_index": 0, "content_index": 0}
    empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    async with answers:
        now = Progress()
        yield numbered("created", response=_response(answers, request, head, now))
        opened = {"id": item, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        yield numbered("output_item.added", output_index=0, item=opened)
        yield numbered("content_part.added", **place, part=empty)
        async for _, before, now in answers.news():
            if len(now.text) > len(before.text):
                yield numbered("output_text.delta", **place, delta=now.text[len(before.text) :], logprobs=[])
        yield numbered("output_text.done", **place, text=now.text, logprobs=[])
        message = _message(now, item)
        yield numbered("content_part.done", **place, part=message["content"][0])
        yield numbered("output_item.done", output_index=0, item=message)
        response = _response(answers, request, head, now, item)
        yield numbered(response["status"], response=response)
