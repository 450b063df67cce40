"""`camelid serve` as a process: what it says, what it refuses, how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from .conftest import CHAT, ENDLESS, HELLO

KEY = "correct-horse-battery"


@contextmanager
def process(folder: Path, *more: str, key: str = "") -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "camelid", "serve", str(folder), "--port", "0", "--threads", "1", *more]
    env = {**os.environ, "CAMELID_API_KEY": key}
    run = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert run.stderr
        line = run.stderr.readline()
        found = re.search(r"http://\S+:\d+", line)
        assert found, line
        base = found[0]
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{base}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.02)
        yield run, base
    finally:
        run.kill()
        run.wait(10)


def ended(run: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = run.communicate(timeout=30)
    return run.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_well(folder: Path, number: signal.Signals) -> None:
    with process(folder, "--json") as (run, base):
        assert httpx.post(base + CHAT, json=HELLO, timeout=30).status_code == 200
        run.send_signal(number)
        code, out, err = ended(run)
        assert code == 0, err
        told = json.loads(out)
        assert told["models"] == ["tiny"]
        assert told["port"] > 0
        line = json.loads(err.strip().splitlines()[-1])
        assert (line["route"], line["status"], line["completion_tokens"]) == (CHAT, 200, 8)
        assert "meaning" not in err  # the log holds nothing that was said


def test_the_log_holds_nothing_that_was_said(folder: Path) -> None:
    """Neither prompt nor answer nor key, of requests that go well and of one that does not; only what is known."""
    said: list[str] = [KEY, "wrong-horse-battery"]
    with process(folder, key=KEY) as (run, base):
        for key, stream in ((KEY, False), (KEY, True), ("wrong-horse-battery", False)):
            body = {**HELLO, "stream": stream, "max_tokens": 40, "user": "somebody@example.org"}
            answer = httpx.post(base + CHAT, json=body, timeout=30, headers={"authorization": f"Bearer {key}"})
            if key == KEY and not stream:
                text = answer.json()["choices"][0]["message"]["content"]
                said += [text, text[:12], json.dumps(text)[1:13]]
        run.send_signal(signal.SIGTERM)
        _, _, err = ended(run)
    said += ["meaning", "somebody"]
    assert not [words for words in said if words in err]
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    asked = [line for line in lines if line["route"] == CHAT]
    assert [line["status"] for line in asked] == [200, 200, 401]
    known = {"time", "request_id", "method", "route", "status", "ms"}
    assert set(asked[2]) - known <= {"fault"}
    for line in asked[:2]:
        assert set(line) - known == {"model", "prompt_tokens", "completion_tokens"}


def test_a_request_that_was_on_its_way_is_answered(folder: Path) -> None:
    body = json.dumps(HELLO).encode()
    with process(folder, "--quiet") as (run, base):
        port = int(base.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=30) as link:
            fields = {"host": "127.0.0.1", "content-type": "application/json", "content-length": len(body)}
            head = "\r\n".join([f"POST {CHAT} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())])
            link.sendall(f"{head}\r\n\r\n".encode() + body[:20])
            time.sleep(0.3)
            run.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            link.sendall(body[20:])
            answer = b""
            while part := link.recv(65536):
                answer += part
                if b'"usage"' in answer:
                    break
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert ended(run)[0] == 0


@pytest.mark.parametrize("port", ["70000", "-1"])
def test_what_is_no_port(folder: Path, port: str) -> None:
    command = [sys.executable, "-m", "camelid", "serve", str(folder), f"--port={port}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"--port {port}: 0 to 65535" in done.stderr


def streams(base: str, found: list[str], begun: list[int]) -> list[threading.Thread]:
    def one(number: int) -> None:
        body = {**HELLO, "stream": True, "max_tokens": 900, **ENDLESS}
        text = ""
        try:
            with httpx.stream("POST", base + CHAT, json=body, timeout=60) as answer:
                for part in answer.iter_text():
                    begun.append(number)
                    text += part
                found.append(text)
        except httpx.TransportError as error:
            found.append(f"{text}cut: {error}")

    threads = [threading.Thread(target=one, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    return threads


def whole_or_told(text: str) -> bool:
    """Whether a stream has its end, or says that it broke off; or was never begun."""
    last = text.strip().splitlines()[-1] if text.strip() else ""
    return text.startswith("cut: ") or last == "data: [DONE]" or '"error"' in last


def terminated(folder: Path, moments: Sequence[float | None]) -> None:
    """A server that is told twice to end, so many seconds after its streams were asked for; None: once they flow."""
    for moment in moments:
        with process(folder, "--quiet") as (run, base):
            found: list[str] = []
            begun: list[int] = []
            threads = streams(base, found, begun)
            deadline = time.monotonic() + 20
            while moment is None and len({*begun}) < 4 and time.monotonic() < deadline:  # all amid their answers
                time.sleep(0.01)
            assert moment is not None or len({*begun}) == 4
            time.sleep(moment or 0)
            run.send_signal(signal.SIGTERM)
            time.sleep(0.02)
            run.send_signal(signal.SIGTERM)  # at once: open streams are told
            code, _, err = ended(run)
            for thread in threads:
                thread.join(10)
            assert (code, err) == (0, "")
            assert len(found) == 4
            assert all(whole_or_told(text) for text in found), [text[-200:] for text in found]


def test_streams_are_told_of_the_end(folder: Path) -> None:
    terminated(folder, [0.0, 0.15, None])


def children(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")  # each thread has its own
    return [int(n) for one in lists for n in one.read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="children are read from /proc")
def test_a_template_that_hangs_is_stopped_and_harms_nobody(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "tiny")
    template = tmp_path / "tiny" / "chat_template.jinja"
    forever = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    template.write_text("{% if 'hang' in messages[0]['content'] %}" + forever + "{% endif %}" + template.read_text())
    hang = {**HELLO, "messages": [{"role": "user", "content": "hang"}]}
    with process(tmp_path / "tiny", "--quiet") as (run, base), ThreadPoolExecutor(40) as pool:
        [first] = children(run.pid)
        many = [pool.submit(httpx.post, base + CHAT, json=hang, timeout=300) for _ in range(40)]  # more than threads
        time.sleep(0.5)
        complete = {"model": "tiny", "prompt": "The meaning", "max_tokens": 4}
        assert httpx.post(f"{base}/v1/completions", json=complete, timeout=4).status_code == 200
        assert httpx.post(f"{base}/tokenize", json={"text": "The"}, timeout=4).status_code == 200
        assert not any(one.done() for one in many)
        answer = next(as_completed(many)).result()
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
        assert "was stopped" in answer.json()["error"]["message"]
        deadline = time.monotonic() + 30
        while not (others := set(children(run.pid)) - {first}) and time.monotonic() < deadline:
            time.sleep(0.05)  # the next one to ask starts it
        [second] = others
        run.send_signal(signal.SIGTERM)
        run.send_signal(signal.SIGTERM)
        assert ended(run)[0] == 0
        assert not Path(f"/proc/{second}").exists()


@pytest.mark.nightly
def test_streams_are_told_at_twenty_moments(folder: Path) -> None:
    chance = random.Random(0)
    terminated(folder, [chance.uniform(0, 0.8) for _ in range(20)])


def test_open_streams_may_end(folder: Path) -> None:
    with process(folder, "--quiet") as (run, base):
        found: list[str] = []
        begun: list[int] = []
        threads = streams(base, found, begun)
        deadline = time.monotonic() + 20
        while len({*begun}) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len({*begun}) == 4
        run.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        with contextlib.suppress(httpx.TransportError):  # it may have ended already
            assert httpx.get(f"{base}/health").status_code == 503
        code, _, err = ended(run)
        for thread in threads:
            thread.join(10)
        assert (code, err) == (0, "")
        told = [text for text in found if text.startswith("data: ")]  # one that came later was refused
        assert told
        assert all(whole_or_told(text) for text in found), [text[-200:] for text in found]
        assert [text.strip().endswith("[DONE]") for text in told] == [True] * len(told)


def test_keys_are_read_again(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    with process(folder, "--quiet", "--api-key-file", str(file)) as (run, base):

        def status(key: str) -> int:
            return httpx.get(f"{base}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

        assert (status(KEY), status("another-key-for-later")) == (200, 401)
        file.write_text("another-key-for-later")
        run.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert (status(KEY), status("another-key-for-later")) == (401, 200)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--host", "0.0.0.0"], "give --api-key-file, or --no-api-key"),
        (["--adapter", "x"], "NAME=DIR"),
        (["--adapter", "tiny=x"], "itself has that name"),
        (["--api-key-file", "/nonexistent"], "no API keys can be read"),
        (["--no-api-key"], "leave out one of them"),
    ],
)
def test_what_is_refused(folder: Path, options: list[str], told: str) -> None:
    command = [sys.executable, "-m", "camelid", "serve", str(folder), "--port", "0", *options]
    keys = {"CAMELID_API_KEY": KEY if "--no-api-key" in options else ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **keys})
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_port_that_is_taken(folder: Path) -> None:
    with process(folder, "--quiet") as (_, base):
        command = [sys.executable, "-m", "camelid", "serve", str(folder), "--port", base.rpartition(":")[2]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert "cannot listen" in done.stderr
