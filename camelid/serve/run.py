"""The server as a process: its socket, its deadlines, its signals."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from camelid.errors import CamelidError, InputError
from camelid.serve.app import Service
from camelid.serve.faults import Fault
from camelid.serve.limits import Limits


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes any free one. Raises InputError for what is no port, CamelidError when it cannot be
    had."""
    if not 0 <= port < 1 << 16:
        raise InputError(f"--port {port}: 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise CamelidError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return bound


def run(app: Any, service: Service, bound: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C. Then no new request is taken, and open ones have the grace time to end; the second
    signal ends them at once."""
    asyncio.run(_Server(configured(app, service.limits), service).serve(sockets=[bound]))


def configured(app: Any, limits: Limits) -> uvicorn.Config:
    """uvicorn's settings: HTTP/1.1 only, our deadlines, and no word of its own."""
    return uvicorn.Config(
        app, http=_protocol(limits), ws="none", lifespan="on", log_config=None, log_level="critical", access_log=False,
        h11_max_incomplete_event_size=limits.headers, server_header=False, proxy_headers=False,
        timeout_keep_alive=30, timeout_graceful_shutdown=10,
        backlog=256,
    )  # fmt: skip


class _Server(uvicorn.Server):
    """uvicorn ends itself again by the signal that ended it; a server that stopped as it was told exits 0."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service, self._stopping = service, False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        yield

    def _stop(self) -> None:
        if self._stopping:
            self._service.end_all()
            return
        self._stopping = self._service.draining = True
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        worker, loop = self._service.worker, asyncio.get_running_loop()
        deadline = loop.time() + self._service.limits.grace_time
        soon = loop.time() + self._service.limits.template_time  # for requests whose body or prompt is on its way
        while loop.time() < deadline and (worker.pending or (self._service.open and loop.time() < soon)):
            await asyncio.sleep(0.02)
        self._service.end_all()
        self.should_exit = True

    def _reload(self) -> None:
        try:
            self._service.keys.reload()
        except CamelidError as error:
            print(f"camelid: the keys stay as they were: {error}", file=sys.stderr)


def _protocol(limits: Limits) -> type[H11Protocol]:
    """HTTP with deadlines: for a request's head to arrive, and for a reader to read."""

    class Protocol(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _unread = 0
        _write: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            idle = self.cycle is None or self.cycle.response_complete
            if idle:
                self._await_head()
                self._unread += len(data)  # the rest of a body that was answered before it came: read, for a while
                if self._unread > 2 * limits.body:
                    self.transport.abort()
                    return
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:
                self._cancel(self._head)
                self._head, self._unread = None, 0

        def send_400_response(self, msg: str) -> None:
            """To what is not HTTP; uvicorn's own answer is a line of text."""
            body = json.dumps(Fault(400, "the request is not HTTP/1.1, or its head is too large").body()).encode()
            length = (b"content-length", str(len(body)).encode())
            headers = [(b"content-type", b"application/json"), length, (b"connection", b"close")]
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                head = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
                for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write = self._write or self.loop.call_later(limits.write_time, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._cancel(self._write)
            self._write = None

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel(self._head)
            self._cancel(self._write)
            super().connection_lost(exc)

        def _await_head(self) -> None:
            if self._head is None:
                self._head = self.loop.call_later(limits.header_time, self.transport.abort)

        @staticmethod
        def _cancel(timer: asyncio.TimerHandle | None) -> None:
            if timer is not None:
                timer.cancel()

    return Protocol
