"""Callers who leave, who do not read, who never finish asking: nothing of theirs stays, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from camelid.generate.engine import Engine
from camelid.generate.sequence import Sequence
from camelid.serve import replies
from camelid.serve.app import Gate
from camelid.serve.chat import _Writer
from camelid.serve.faults import Fault
from camelid.serve.limits import Limits
from camelid.serve.worker import Progress

from .conftest import CHAT, ENDLESS, HELLO, Running, serving

HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LIMITS = Limits(header_time=0.5, body_time=0.5, write_time=0.5, request_time=20)


@pytest.fixture(scope="module")
def strict(engine: Engine) -> Iterator[Running]:
    with serving(engine, limits=LIMITS) as server:
        yield server


def connect(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=15)


def rest(link: socket.socket) -> bytes:
    """All that still comes."""
    data = b""
    try:
        while part := link.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def answer_of(link: socket.socket) -> bytes:
    """One answer; the connection may stay open."""
    data, size = b"", None
    while size is None or len(data.partition(b"\r\n\r\n")[2]) < size:
        part = link.recv(65536)
        assert part, data
        data += part
        if b"\r\n\r\n" in data:
            size = int(data.lower().partition(b"content-length:")[2].split()[0])
    return data


def drained(server: Running) -> None:
    deadline = time.monotonic() + 10
    scheduler = server.service.engine.scheduler
    while (server.service.worker.pending or scheduler.busy or scheduler.pages.taken) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (server.service.worker.pending, scheduler.pages.taken) == (0, 0)
    assert not scheduler.busy


def storm(server: Running, streams: int, leaving: int, seed: int) -> list[str | None]:
    """Texts of `streams` requests at once, of which `leaving` break off at a random moment (None)."""
    chance = random.Random(seed)
    leave = {n: chance.randrange(0, 8) for n in chance.sample(range(streams), leaving)}
    ends = {str(i): -100 for i in server.service.engine.stop_ids}

    async def one(client: httpx.AsyncClient, number: int) -> str | None:
        body = {**HELLO, "messages": [{"role": "user", "content": f"Number {number}"}], "max_tokens": 80}
        body |= {"stream": True, "logit_bias": ends}
        text, seen = "", 0
        async with client.stream("POST", CHAT, json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return text
                if line.startswith("data: "):
                    if number in leave and seen >= leave[number]:
                        return None
                    seen += 1
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
        raise AssertionError("the stream ended without its end")

    async def all_of_them() -> list[str | None]:
        limits = httpx.Limits(max_connections=streams)
        async with httpx.AsyncClient(base_url=server.base, timeout=120, limits=limits) as client:
            return list(await asyncio.gather(*(one(client, n) for n in range(streams))))

    return asyncio.run(all_of_them())


def test_half_of_sixty_four_leave(running: Running) -> None:
    wanted = storm(running, 64, 0, 0)
    drained(running)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    found = storm(running, 64, 32, 1)
    drained(running)
    assert [f for f in found if f is not None] == [w for w, f in zip(wanted, found, strict=True) if f is not None]
    assert sum(f is None for f in found) >= 25  # some end before their moment to leave
    time.sleep(0.2)
    assert threading.active_count() <= threads + 2  # idle threads of the pool for prompts
    assert len(os.listdir("/proc/self/fd")) <= files + 2


@contextmanager
def disturbed(server: Running) -> Iterator[list[int]]:
    """Thirty callers who read nothing of long answers and sixty who send a letter a second, again and again, for as
    long as the block lasts. Gives how often each kind was cut off."""
    over, cut = threading.Event(), [0, 0]
    asked = json.dumps({**HELLO, "max_tokens": 900, "logprobs": True, "top_logprobs": 20, "stream": True, **ENDLESS})
    long = f"{HEAD}Content-Length: {len(asked)}\r\n\r\n{asked}".encode()

    def caller(kind: int) -> None:
        while not over.is_set():
            with socket.socket() as link:
                link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                link.settimeout(30)
                try:
                    link.connect(("127.0.0.1", server.port))
                    link.sendall(long if kind == 0 else b"")
                    for letter in HEAD * 9:
                        if over.wait(1):
                            return
                        link.sendall(letter.encode() if kind else b"\r")  # fails once the other side has closed
                except OSError:
                    cut[kind] += 1

    threads = [threading.Thread(target=caller, args=(int(n >= 30),)) for n in range(90)]
    for thread in threads:
        thread.start()
    try:
        yield cut
    finally:
        over.set()
        for thread in threads:
            thread.join()


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.nightly
def test_two_thousand_requests_and_a_thousand_leave(engine: Engine) -> None:
    """Beside callers who do not read and callers who do not finish asking."""
    with serving(engine, limits=Limits(header_time=3, body_time=3, write_time=3)) as server:
        wanted = storm(server, 80, 0, 0)
        drained(server)
        threads, files, held = threading.active_count(), len(os.listdir("/proc/self/fd")), 0
        with disturbed(server) as cut:
            for round_ in range(25):
                found = storm(server, 80, 40, round_)
                assert [(w, f) for w, f in zip(wanted, found, strict=True) if f is not None and f != w] == []
                held = held or (resident() if round_ == 4 else 0)
        drained(server)
        grown = resident() / held - 1
        assert min(cut) >= 30, cut
        assert grown < 0.02, grown
        time.sleep(0.5)
        assert threading.active_count() <= threads + 2
        assert len(os.listdir("/proc/self/fd")) <= files + 2
        print(f"cut off: {cut[0]} who did not read, {cut[1]} who did not ask; memory {grown:+.2%} in 20 rounds")


def test_a_caller_who_waits_for_the_whole_may_leave_too(running: Running) -> None:
    body = json.dumps({**HELLO, "max_tokens": 900, **ENDLESS}).encode()
    with connect(running) as link:
        link.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        deadline = time.monotonic() + 10
        while not running.service.worker.pending and time.monotonic() < deadline:
            time.sleep(0.002)
    drained(running)


def test_the_defaults_are_those_that_are_promised(running: Running) -> None:
    """docs/serving.md's: loosening one is a decision, not a slip. A body may have just so many bytes."""
    assert Limits() == Limits(
        body=4 * 2**20, headers=64 * 2**10, depth=64, requests=128, queue=256, header_time=10, body_time=30,
        write_time=30, request_time=600, grace_time=30,
    )  # fmt: skip
    for more, status in ((0, 200), (1, 413)):
        body = json.dumps(HELLO).encode().ljust(Limits().body + more)
        answer = httpx.post(running.base + CHAT, content=body, headers={"content-type": "application/json"}, timeout=60)
        assert answer.status_code == status


@pytest.mark.parametrize("sent", ["", "POST /v1/chat", HEAD])
def test_a_head_that_does_not_come(strict: Running, sent: str) -> None:
    begun = time.monotonic()
    with connect(strict) as link:
        link.sendall(sent.encode())
        rest(link)
    assert time.monotonic() - begun < 3


def test_a_second_head_that_does_not_come(strict: Running) -> None:
    """Also on a connection that was used before."""
    with connect(strict) as link:
        link.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200" in link.recv(4096)
        begun = time.monotonic()
        link.sendall(b"GET /hea")
        rest(link)
    assert time.monotonic() - begun < 3


def test_a_body_that_does_not_come(strict: Running) -> None:
    begun = time.monotonic()
    with connect(strict) as link:
        link.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        answer = answer_of(link)
    assert b"408" in answer.split(b"\r\n")[0]
    assert b'"timeout_error"' in answer
    assert time.monotonic() - begun < 8


def test_a_reader_who_does_not_read(strict: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is larger than all buffers between; its text is given up, and its pages are free."""
    body = json.dumps({
        **HELLO, "max_tokens": 900, "n": 8, "logprobs": True, "top_logprobs": 20, "stream": True,
        **ENDLESS,
    }).encode()  # fmt: skip
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.connect(("127.0.0.1", strict.port))
        link.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b"200" in link.recv(100)
        drained(strict)


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        (f"Content-Length: {1 << 40}", b"{", 413),
        (f"Content-Length: {10**30}", b"{", 400),  # h11 takes twenty digits
        ("Transfer-Encoding: chunked", b"100000\r\n" + b" " * (1 << 20) + b"\r\n", 413),
        ("Content-Encoding: gzip\r\nContent-Length: 2", b"\x1f\x8b", 415),
        ("Content-Length: 2\r\nContent-Length: 3", b"{}", 400),
        ("Content-Length: -1", b"{}", 400),
        ("\r\n".join(f"X-{n}: {n}" for n in range(10_000)), b"", 400),
        (f"X-Long: {'a' * 100_000}", b"", 400),
    ],
)
def test_too_much(running: Running, head: str, body: bytes, status: int) -> None:
    with connect(running) as link:
        link.sendall(f"{HEAD}{head}\r\n\r\n".encode())
        try:
            for _ in range(100 if b"100000" in body else 1):  # a hundred MiB, if it were read
                link.sendall(body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server has had enough
        answer = answer_of(link)
        assert int(answer.split()[1]) == status, answer[:300]
        replies.Error.model_validate_json(answer.partition(b"\r\n\r\n")[2])


def test_a_queue_that_is_full(engine: Engine) -> None:
    limits = Limits(queue=4)
    with serving(engine, limits=limits) as server:
        body = {**HELLO, "max_tokens": 300, "n": 3, **ENDLESS}
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: server.post(CHAT, body), range(6)))
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses[0] == 200
        assert statuses[-1] == 429
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) > 0
        with pytest.raises(openai.BadRequestError):  # never would there be room
            server.client.chat.completions.create(**{**HELLO, "n": 5})
        drained(server)


def broken(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Every text fails after some tokens."""
    take = Sequence.take

    def failing(self: Sequence, *rows: Any) -> None:
        take(self, *rows)
        if len(self.ids) > after:
            self.finish, self.error = "error", "a fault of the test"

    monkeypatch.setattr(Sequence, "take", failing)


def test_a_stream_that_we_break_never_looks_complete(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of our own amid the events, which no text of the engine's has."""
    deltas, times = _Writer.deltas, iter(range(100))

    def failing(self: _Writer, now: Progress) -> tuple[list[dict[str, Any]], str | None]:
        if next(times) == 2:
            raise ZeroDivisionError("a fault of the test")
        return deltas(self, now)

    monkeypatch.setattr(_Writer, "deltas", failing)
    text = running.post(CHAT, {**HELLO, "max_tokens": 900, "stream": True, **ENDLESS}).text
    assert "[DONE]" not in text
    assert json.loads(text.strip().splitlines()[-1].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "ZeroDivision" not in text
    drained(running)


def test_a_broken_stream_never_looks_complete(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, 3)
    logged: list[dict[str, Any]] = []
    monkeypatch.setattr(Gate, "_log", lambda *line: logged.append(line[-1]))
    with pytest.raises(openai.InternalServerError):
        running.client.chat.completions.create(**HELLO)
    with pytest.raises(openai.APIError, match="could not be finished"):
        for _ in running.client.chat.completions.create(**HELLO, stream=True):
            pass
    with httpx.stream("POST", running.base + CHAT, json={**HELLO, "stream": True}) as answer:
        text = answer.read().decode()
    assert "[DONE]" not in text
    assert '"server_error"' in text
    assert "a fault" not in text
    drained(running)
    # A line is written after its answer was read to the end; an earlier test's may come late and tells of no fault.
    faults, deadline = [], time.monotonic() + 10
    while len(faults) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
        faults = [line["error"] for line in logged if "error" in line]
    assert faults == ["a fault of the test"] * 3


def test_an_engine_that_fails_goes_on(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    sentinel = running.post(CHAT, HELLO).json()["choices"]
    run, told = running.service.engine.runner.run, []

    def failing(chunks: Any) -> Any:
        monkeypatch.undo()
        told.append(1)
        raise RuntimeError("a fault of the test")

    monkeypatch.setattr(running.service.engine.runner, "run", failing)
    assert running.post(CHAT, HELLO).status_code == 500
    assert told == [1]
    assert run
    assert running.post(CHAT, HELLO).json()["choices"] == sentinel
    drained(running)


def test_a_text_that_takes_too_long(engine: Engine) -> None:
    with serving(engine, limits=Limits(request_time=0.05)) as server:
        body: Any = {**HELLO, "max_tokens": 900, **ENDLESS}
        assert server.post(CHAT, body).status_code == 408
        with pytest.raises(openai.APIError, match="too long"):
            for _ in server.client.chat.completions.create(**body, stream=True):
                pass
        drained(server)


@pytest.mark.parametrize(
    ("fault", "again"),
    [(Fault(500, "", code="generation_failed"), False), (Fault(408, ""), False), (Fault(429, "", retry_after=5), True),
     (Fault(503, "", code="shutting_down"), True)],
)  # fmt: skip
def test_what_would_fail_again_is_not_asked_for_again(fault: Fault, again: bool) -> None:
    """OpenAI's client heeds it."""
    assert ((b"x-should-retry", b"false") not in fault.headers()) == again
