"""One request that costs much, fails or leaves, and what the others notice of it: nothing."""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.types import Scope

from camelid.generate.constrain import Form, Matcher
from camelid.generate.engine import Engine
from camelid.generate.sampling import SamplingParams
from camelid.serve.app import Gate
from camelid.serve.endpoint import tell, tell_fault
from camelid.serve.limits import Limits

from .conftest import CHAT, ENDLESS, HELLO, Running, serving
from .test_load import HEAD, answer_of, connect, drained


def test_a_form_that_breaks_ends_its_own_text_alone(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a matcher raises in the middle of a step."""
    long: dict[str, Any] = {**HELLO, **ENDLESS, "max_tokens": 300}
    wanted = running.post(CHAT, long).json()["choices"]
    take = Matcher.take

    def breaking(self: Matcher, token: int) -> bool:
        take(self, token)
        raise RuntimeError("a fault of the test")

    monkeypatch.setattr(Matcher, "take", breaking)
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(running.post, CHAT, long) for _ in range(4)]
        broken = [pool.submit(running.post, CHAT, {**HELLO, "response_format": schema}) for _ in range(2)]
        assert [one.result().status_code for one in broken] == [500, 500]
        assert [one.result().json()["choices"] for one in others] == [wanted] * 4
    assert running.service.worker.failures == 0
    drained(running)


def test_an_engine_that_always_fails_is_not_ready(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where requests come one after another, and idle steps between them."""
    engine = Engine.from_pretrained(folder, threads=1)

    def failing(planned: Any) -> Any:
        raise RuntimeError("a fault of the test")

    with serving(engine) as running:
        assert running.post(CHAT, HELLO).status_code == 200
        with monkeypatch.context() as broken:
            broken.setattr(engine.runner, "run", failing)
            for _ in range(3):
                assert httpx.get(f"{running.base}/health").status_code == 200
                assert running.post(CHAT, HELLO).status_code == 500
                drained(running)
            assert httpx.get(f"{running.base}/health").status_code == 503
        assert running.post(CHAT, HELLO).status_code == 200
        assert httpx.get(f"{running.base}/health").status_code == 200


def test_embeddings_of_those_who_left_are_not_computed(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, computed = running.service.engine, []
    embedding, left = engine.embedding, threading.Event()

    def slow(*asked: Any) -> Any:
        computed.append(1)
        left.wait(30)
        return (yield from embedding(*asked))

    monkeypatch.setattr(engine, "embedding", slow)
    body = json.dumps({"model": "tiny", "input": "a"}).encode()
    head = HEAD.replace(CHAT, "/v1/embeddings")
    links = [connect(running) for _ in range(12)]
    for link in links:
        link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    deadline = time.monotonic() + 30
    while not computed and time.monotonic() < deadline:
        time.sleep(0.01)
    for link in links:
        link.close()
    time.sleep(0.3)  # the server hears of it
    left.set()
    assert running.post(CHAT, HELLO).status_code == 200
    drained(running)
    assert 1 <= len(computed) < 12


def test_places_in_the_queue_are_held_while_prompts_are_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(engine, limits=Limits(queue=16)) as server:
        most, prepare = [], engine.prepare

        def slow(*args: Any) -> Any:
            time.sleep(0.02)
            most.append(server.service.worker.pending)
            return prepare(*args)

        monkeypatch.setattr(engine, "prepare", slow)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: server.post(CHAT, {**HELLO, "n": 8}), range(8)))
        assert {answer.status_code for answer in answers} == {200, 429}
        assert max(most) <= 16
        drained(server)


def test_one_request_may_not_ask_for_everything(running: Running) -> None:
    asked = {"model": "tiny", "prompt": ["a"] * 16, "n": 8, "max_tokens": 1024}
    answer = running.post("/v1/completions", asked)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "request_too_large"
    assert running.post("/v1/completions", {**asked, "max_tokens": 8}).status_code == 200


def test_prompts_are_measured_each_by_itself(running: Running) -> None:
    service = running.service
    words = service.engine.tokenizer
    assert words
    longest = max(set(range(len(words))) - words.special_tokens.keys(), key=lambda i: len(words.token_bytes(i)))
    asked = {"model": "tiny", "prompt": [words.decode([longest] * 400)] * 30, "max_tokens": 1}
    assert sum(map(len, asked["prompt"])) > service.engine.context_length * service.longest_token
    assert running.post("/v1/completions", asked).status_code == 200


def test_more_texts_than_ever_fit_are_not_asked_for_again(running: Running) -> None:
    answer = running.post("/v1/completions", {"model": "tiny", "prompt": ["a"] * 128, "n": 3, "max_tokens": 1})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request_too_large")


def test_requests_go_on_when_nobody_reads_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    tell({"status": 200})
    tell_fault("1", ValueError("x"))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"text": "a " * 500_000}),
        ("/v1/completions", {"model": "tiny", "prompt": "word " * 200_000}),
        (CHAT, {**HELLO, "messages": [{"role": "user", "content": "<|eot " * 150_000}]}),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_cut(running: Running, path: str, body: Any) -> None:
    begun = time.monotonic()
    answer = running.post(path, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert time.monotonic() - begun < 1.5


def test_long_messages_are_not_kept(running: Running) -> None:
    tokenizer = running.service.engine.tokenizer
    assert tokenizer is not None
    text = "kept? " * 1000
    first = tokenizer.encode_chat(text)
    assert tokenizer.encode_chat(text) == first
    assert tokenizer.encode_chat(text) is not first


def test_a_refusal_leaves_the_connection_usable(running: Running) -> None:
    """Also one that came before the body was read."""
    with httpx.Client(base_url=running.base) as client:
        for _ in range(3):
            refused = client.post(CHAT, content=b"x" * 300_000, headers={"content-type": "text/plain"})
            assert refused.status_code == 415
            assert client.get("/health").status_code == 200
            time.sleep(0.1)
        time.sleep(1.2)
        assert client.get("/health").status_code == 200


def test_two_requests_in_one_piece(running: Running) -> None:
    body = json.dumps(HELLO).encode()
    whole = f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with connect(running) as link:
        link.sendall(whole + whole[:-20])
        first = answer_of(link)
        link.sendall(whole[-20:])
        second = answer_of(link)
    assert b"200" in first.split(b"\r\n")[0]
    assert b"200" in second.split(b"\r\n")[0]


def test_tools_with_definitions(running: Running) -> None:
    """As pydantic describes a model within a model."""
    parameters = {
        "$defs": {"City": {"enum": ["Paris", "Berlin"]}}, "type": "object",
        "properties": {"to": {"$ref": "#/$defs/City"}}, "required": ["to"], "additionalProperties": False,
    }  # fmt: skip
    tools: Any = [{"type": "function", "function": {"name": n, "parameters": parameters}} for n in ("go", "come")]
    answer = running.client.chat.completions.create(
        model="tiny", messages=HELLO["messages"], tools=tools, tool_choice="required", seed=1
    )
    assert answer.choices[0].message.tool_calls
    call: Any = answer.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments)["to"] in ("Paris", "Berlin")


def test_a_response_of_a_schema(running: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    answer = running.client.responses.create(
        model="tiny", input="a", text={"format": {"type": "json_schema", "name": "x", "schema": schema}}
    )
    assert json.loads(answer.output_text)["a"] in (1, 2)
    with pytest.raises(openai.BadRequestError, match="tools"):
        running.client.responses.create(
            model="tiny", input="a", tools=[{"type": "function", "name": "x", "parameters": {}, "strict": True}]
        )


def test_many_embeddings_and_an_echo_of_no_token(running: Running) -> None:
    found = running.client.embeddings.create(model="tiny", input=["a"] * 40)
    assert len(found.data) == 40
    answer = running.post("/v1/completions", {"model": "tiny", "prompt": [99999], "echo": True})
    assert answer.status_code == 400


def test_origins_and_hosts_of_ours() -> None:
    async def inner(*_: Any) -> None: ...

    gate = Gate(inner, None, ["MyBox", "fd00::1"], ["https://a.example"], True)  # type: ignore[arg-type]
    wanted = (b"access-control-request-headers", b"x-stainless-os, authorization")
    scope: Scope = {"headers": [(b"origin", b"https://a.example"), wanted]}
    allowed = dict(gate._cors("https://a.example", scope))
    assert allowed[b"access-control-allow-headers"] == wanted[1]
    assert b"x-request-id" in allowed[b"access-control-expose-headers"]
    assert gate._cors("https://b.example", scope) == []
    assert gate._hosts == {"mybox", "fd00::1"}


def test_a_form_too_large_fails_its_own_text(engine: Engine) -> None:
    """llguidance refuses some forms only while they are followed."""
    schema = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(2000)}}
    results = engine.generate(
        ["The meaning", "The meaning"],
        [
            SamplingParams(max_new_tokens=8, form=Form("json_schema", json.dumps(schema))),
            SamplingParams(max_new_tokens=8),
        ],
        strict=False,
    )
    assert results[1].error is None
    assert len(results[1].ids) > 0
