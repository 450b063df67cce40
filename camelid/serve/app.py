"""The application: routes, and what stands before all of them."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from camelid.generate.engine import Engine
from camelid.serve.answer import Call
from camelid.serve.auth import LOOPBACK, OPEN, Keys, check_host
from camelid.serve.chat import chat
from camelid.serve.completions import complete
from camelid.serve.endpoint import Endpoint, Handler, reply, tell, tell_fault
from camelid.serve.faults import Fault, unforeseen
from camelid.serve.limits import Limits
from camelid.serve.metrics import Metrics
from camelid.serve.openapi import described
from camelid.serve.others import embed, respond, tokenize
from camelid.serve.worker import Worker
from camelid.tokenizer.template import render
from camelid.tokenizer.template_child import TemplateChild, limited

POSTS: Mapping[str, Handler] = {
    "/v1/chat/completions": chat,
    "/v1/completions": complete,
    "/v1/embeddings": embed,
    "/v1/responses": respond,
    "/tokenize": tokenize,
}
PAGE_KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
# The page loads nothing from elsewhere and is shown in no other page.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Service:
    """An engine under a name, with its adapters as further models, and what serving it takes."""

    def __init__(
        self, engine: Engine, name: str, keys: Keys, limits: Limits | None = None, control_tokens: bool = False
    ) -> None:
        self.engine, self.name, self.keys, self.limits = engine, name, keys, limits or Limits()
        self.control_tokens = control_tokens
        self.names: dict[str, str | None] = {name: None, **{a: a for a in engine.runner.adapters}}
        self.metrics = Metrics()
        self.worker = Worker(engine, lambda error: tell_fault("", error))
        self.metrics.watch(self.worker)
        words = engine.tokenizer
        self.longest_token = max((len(words.token(i)) for i in range(len(words))), default=1) if words else 1
        self._templates: TemplateChild | None = None
        self._threads: ThreadPoolExecutor | None = None
        self.draining = False
        self.open = 0  # requests that are not answered yet
        self.started = int(time.time())

    def start(self) -> None:
        """Take requests. The chat template, which came with the model, runs in a process of its own."""
        words = self.engine.tokenizer
        self._templates = limited(words, self.limits.template_time) if words is not None else None
        if self._templates is not None:
            self._threads = ThreadPoolExecutor(2, "template")
        self.worker.start()

    def end_all(self) -> None:
        """End every text, and every conversation that is still being put into the template."""
        self.worker.end_all()
        if self._templates is not None:
            self._templates.close()

    def stop(self) -> None:
        """End what `start` started."""
        self.worker.stop()
        words = self.engine.tokenizer
        if words is not None and words.renderer is self._templates:
            words.renderer = render
        if self._templates is not None:
            self._templates.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    def call(self, scope: Scope) -> Call:
        state = scope["state"]
        return Call(
            self.engine, self.worker, self.limits, self.metrics, self.names, self.longest_token, self.control_tokens,
            self._threads, state["caller"], state["request_id"], state["told"],
        )  # fmt: skip


def app_of(
    service: Service, hosts: Iterable[str] = LOOPBACK, origins: Iterable[str] = (), quiet: bool = False
) -> ASGIApp:
    """The ASGI application. `hosts` it may be called by ("*": any), `origins` of web pages that may ask it."""

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    routes: list[BaseRoute] = [
        Route(path, Endpoint(handler, service.call), methods=["POST"]) for path, handler in POSTS.items()
    ]
    routes += [
        Route("/v1/models", lambda _: JSONResponse(_models(service)), methods=["GET"]),
        Route("/v1/models/{name:path}", lambda request: _model(service, request), methods=["GET"]),
        Route("/health", lambda _: _health(service), methods=["GET"]),
        Route("/metrics", lambda _: Response(service.metrics.text(), media_type="text/plain; version=0.0.4")),
        Route(
            "/openapi.json",
            lambda _: JSONResponse(described(list(service.names), service.engine.config)),
            methods=["GET"],
        ),
        Route("/", lambda _: _page("index.html"), methods=["GET"]),
    ]
    routes += [
        Route(path, lambda request: _page(request.url.path.rpartition("/")[2]), methods=["GET"])
        for path in sorted(OPEN)
        if path.startswith("/page/")
    ]
    return Gate(Router(routes, redirect_slashes=False, lifespan=lifespan), service, hosts, origins, quiet)


class Gate:
    """Every request passes here first and last: its host, its key, its number, its line in the log, its fault."""

    def __init__(
        self, inner: ASGIApp, service: Service, hosts: Iterable[str], origins: Iterable[str], quiet: bool
    ) -> None:
        self._inner, self._service, self._quiet = inner, service, quiet
        self._hosts, self._origins = frozenset(map(str.lower, hosts)), frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        request_id, begun = uuid.uuid4().hex, time.perf_counter()
        told: dict[str, Any] = {}
        status = 0
        origin = next((v.decode("latin-1") for n, v in scope["headers"] if n == b"origin"), "")
        headers = [(b"x-request-id", request_id.encode()), *self._cors(origin, scope)]

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        self._service.open += 1
        self._service.metrics.open.inc()
        try:
            await self._pass(scope, receive, sending, origin, request_id, told)
        except (Fault, HTTPException) as error:
            fault = error if isinstance(error, Fault) else _refusal(error)
            if status:
                raise  # the answer has begun: the connection is cut, which no client takes for an end
            await reply(sending, fault.status, fault.body(), fault.headers())
        except ClientDisconnect:
            told["left"] = True
        except Exception as error:
            tell_fault(request_id, error)
            if status:
                raise
            await reply(sending, 500, unforeseen().body())
        finally:
            self._service.open -= 1
            self._service.metrics.open.dec()
            self._log(scope, request_id, status, time.perf_counter() - begun, told)

    async def _pass(
        self, scope: Scope, receive: Receive, send: Send, origin: str, request_id: str, told: dict[str, Any]
    ) -> None:
        check_host(scope, self._hosts)
        if scope["method"] == "OPTIONS" and origin in self._origins:
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        caller = self._service.keys.check(scope)
        if scope["path"] not in OPEN:
            if self._service.draining:
                raise Fault(503, "the server is shutting down", code="shutting_down", retry_after=5)
            if self._service.open > self._service.limits.requests:
                raise Fault(429, "too many requests at once; ask again", code="too_many_requests", retry_after=2)
        scope.setdefault("state", {}).update(caller=caller, request_id=request_id, told=told)
        scope["app"] = self  # so the router raises what it refuses
        await self._inner(scope, receive, send)

    def _cors(self, origin: str, scope: Scope) -> list[tuple[bytes, bytes]]:
        """For a page of an origin that may ask: whatever headers it wants to send, for a key is not a cookie."""
        if not origin or origin not in self._origins:
            return []
        wanted = next((v for n, v in scope["headers"] if n == b"access-control-request-headers"), b"")
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin"),
            (b"access-control-allow-headers", wanted or b"authorization, content-type"),
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-expose-headers", b"x-request-id, retry-after"),
        ]  # fmt: skip

    def _log(self, scope: Scope, request_id: str, status: int, seconds: float, told: dict[str, Any]) -> None:
        route = scope["path"] if scope["path"] in KNOWN else "other"
        self._service.metrics.requests.labels(route, str(status or "left")).inc()
        if not self._quiet:
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "request_id": request_id, "method": scope["method"],
                "route": route, "status": status, "ms": round(seconds * 1e3), **told,
            }  # fmt: skip
            tell(line)


KNOWN = frozenset({*POSTS, *OPEN, "/v1/models", "/metrics", "/openapi.json"})


def _models(service: Service) -> dict[str, Any]:
    return {"object": "list", "data": [_described(service, name) for name in service.names]}


def _described(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name, "object": "model", "created": service.started, "owned_by": "camelid",
        "max_model_len": service.engine.context_length,
        "chat": service.engine.tokenizer is not None and service.engine.tokenizer.chat_template is not None,
    }  # fmt: skip


def _model(service: Service, request: Request) -> Response:
    name = request.path_params["name"]
    if name not in service.names:
        raise Fault(404, "there is no model of that name", "model", "model_not_found")
    return JSONResponse(_described(service, name))


def _health(service: Service) -> Response:
    """Ready or not; nothing else, for it is told to anybody."""
    ready = service.worker.healthy and not service.draining
    return JSONResponse({"status": "ok" if ready else "unavailable"}, 200 if ready else 503)


def _page(name: str) -> Response:
    data = resources.files("camelid.serve").joinpath("page", name).read_bytes()
    return Response(data, media_type=PAGE_KINDS[name.rpartition(".")[2]], headers=PAGE_HEADERS)


def _refusal(error: HTTPException) -> Fault:
    """The router's own."""
    if error.status_code == 404:
        return Fault(404, "there is nothing at this path", code="not_found")
    if error.status_code == 405:
        return Fault(
            405, "this path takes another method", code="method_not_allowed", allow=(error.headers or {}).get("Allow")
        )
    return Fault(error.status_code, "the request was refused")
