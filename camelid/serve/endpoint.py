"""One route's way from bytes to bytes: the body is read and checked, the handler answers with an object or a stream of
events, every fault becomes an error in OpenAI's form, and a caller who leaves takes the work along."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from camelid.serve.answer import Call
from camelid.serve.faults import Fault, unforeseen
from camelid.serve.limits import read_json

Events = AsyncGenerator[dict[str, Any], None]
Handler = Callable[[Call, dict[str, Any]], Awaitable[dict[str, Any] | Events]]
JSON = [(b"content-type", b"application/json")]
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Endpoint:
    """An ASGI application for one POST route."""

    def __init__(self, handler: Handler, call: Callable[[Scope], Call]) -> None:
        self._handler, self._call = handler, call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._call(scope)
        body = await read_json(Request(scope, receive), call.limits)
        work = asyncio.create_task(self._answer(call, body, send))
        left = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                call.told["left"] = True
        finally:
            left.cancel()
            work.cancel()
            await asyncio.wait({work, left})
        if not work.cancelled():
            await work

    async def _answer(self, call: Call, body: dict[str, Any], send: Send) -> None:
        try:
            async with asyncio.timeout(call.limits.request_time):
                answer = await self._handler(call, body)
                if isinstance(answer, dict):
                    await reply(send, 200, answer)
                    return
        except TimeoutError:
            raise Fault(408, "the request took too long", code="request_timeout") from None
        await self._stream(call, answer, send)

    async def _stream(self, call: Call, events: Events, send: Send) -> None:
        """Send events until they end. One that never ends well says so: a stream without [DONE] has an error."""
        try:
            async with asyncio.timeout(call.limits.request_time):
                first = await anext(events, None)  # what is wrong with a request is told by its status
        except TimeoutError:
            raise Fault(408, "the request took too long", code="request_timeout") from None
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        try:
            async with asyncio.timeout(call.limits.request_time):
                if first is not None:
                    await _event(send, first)
                async for event in events:
                    await _event(send, event)
            end = b"data: [DONE]\n\n"
        except Fault as fault:
            end = _packed(fault.body())
        except TimeoutError:
            end = _packed(Fault(408, "the request took too long", code="request_timeout").body())
        except Exception as error:
            tell_fault(call.request_id, error)
            end = _packed(unforeseen().body())
        finally:
            await events.aclose()
        await send({"type": "http.response.body", "body": end})


def _packed(event: dict[str, Any]) -> bytes:
    name = f"event: {event['type']}\n" if isinstance(event.get("type"), str) else ""
    return f"{name}data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()


async def _event(send: Send, event: dict[str, Any]) -> None:
    await send({"type": "http.response.body", "body": _packed(event), "more_body": True})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def reply(send: Send, status: int, value: Any, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """A JSON answer."""
    body = json.dumps(value, ensure_ascii=False).encode()
    length = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*JSON, *length, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})


def tell_fault(request_id: str, error: BaseException) -> None:
    """An unforeseen error, for the person who runs the server."""
    text = "".join(traceback.format_exception(error))
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "request_id": request_id, "error": text}
    tell(line)


def tell(line: dict[str, Any]) -> None:
    """A line of the log. When nobody reads it any more, requests go on all the same."""
    with suppress(OSError, ValueError):
        print(json.dumps(line), file=sys.stderr, flush=True)
