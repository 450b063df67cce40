"""Bodies that no client should send: each is refused in OpenAI's form, and harms nobody."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from camelid.serve import replies

from .conftest import CHAT, HELLO, Running

JSON = {"content-type": "application/json"}
ROUTES: dict[str, dict[str, Any]] = {
    CHAT: HELLO,
    "/v1/completions": {"model": "tiny", "prompt": "a", "max_tokens": 2},
    "/v1/embeddings": {"model": "tiny", "input": "a"},
    "/v1/responses": {"model": "tiny", "input": "a", "max_output_tokens": 2},
    "/tokenize": {"text": "a"},
}
RANGES: dict[str, tuple[float, float]] = {  # of /v1/chat/completions and /v1/completions
    "temperature": (0, 2), "top_p": (0, 1), "n": (1, 8), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2),
    "max_tokens": (1, 1 << 20), "seed": (-(2**63), 2**63 - 1), "top_k": (0, 1 << 20), "min_p": (0, 1),
    "typical_p": (0, 1), "repetition_penalty": (0, 10), "lookup": (0, 32),
}  # fmt: skip
CHAT_RANGES = {"max_completion_tokens": (1, 1 << 20), "top_logprobs": (0, 20)}
WHOLE = {"n", "max_tokens", "seed", "top_k", "lookup", "max_completion_tokens", "top_logprobs"}


def raw_bodies() -> Iterator[tuple[str, str, bytes]]:
    """(name, path, body) that are no JSON object of the kind that is read at all."""
    for path, good in ROUTES.items():
        whole = json.dumps(good)
        field = next(iter(good))
        bodies: dict[str, bytes] = {
            "empty": b"", "half": whole[:-3].encode(), "two": (whole * 2).encode(), "list": b"[]", "string": b'"a"',
            "number": b"1", "null": b"null", "true": b"true", "byte order mark": b"\xef\xbb\xbf" + whole.encode(),
            "utf-16": whole.encode("utf-16"), "latin-1": b'{"model": "\xe9"}', "NUL": b"\0" + whole.encode(),
            "deep list": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
            "65 deep": b'{"a":' + b"[" * 65 + b"]" * 65 + b"}",
            "5,000 digits": whole[:-1].encode() + b', "seed": ' + b"9" * 5000 + b"}",
            "NaN": whole[:-1].encode() + b', "temperature": NaN}',
            "Infinity": whole[:-1].encode() + b', "temperature": Infinity}',
            "1e999": whole[:-1].encode() + b', "temperature": 1e999}',
            "key twice": whole[:-1].encode() + f', "{field}": "tiny"}}'.encode(),
            "half a surrogate": whole[:-1].encode() + b', "user": "\\ud800"}',
            "half a surrogate as key": whole[:-1].encode() + b', "\\udfff": 1}',
            "comment": whole.encode() + b"// a", "single quotes": b"{'model': 'tiny'}", "form": b"model=tiny",
        }  # fmt: skip
        for name, body in bodies.items():
            yield name, path, body


def bad_fields() -> Iterator[tuple[str, Any]]:
    """(path, body) whose JSON is good and whose fields are not."""
    for path in (CHAT, "/v1/completions"):
        ranges = {**RANGES, **(CHAT_RANGES if path == CHAT else {"logprobs": (0, 20)})}
        for field, (low, high) in ranges.items():
            wrong: list[Any] = [low - 1, high + 1, 10**30, -(10**30), True, "1", [1], {"a": 1}]
            wrong += [1.5] if field in WHOLE else []
            for value in wrong:
                extra = {"logprobs": True} if field == "top_logprobs" else {}
                yield path, {**ROUTES[path], **extra, field: value}
    others: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"begin_with_ids": [5], "response_format": {"type": "json_object"}}),
        (CHAT, {"begin_with_ids": [5], "tools": [{"type": "function", "function": {"name": "clock"}}]}),
        (CHAT, {"messages": "hello"}), (CHAT, {"messages": [1]}), (CHAT, {"messages": [{}]}),
        (CHAT, {"messages": [{"role": "robot", "content": "a"}]}),
        (CHAT, {"messages": [{"role": "user", "content": 1}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}]}),
        (CHAT, {"messages": [{"role": "user", "content": "a"}] * 2049}), (CHAT, {"model": None}), (CHAT, {"model": 1}),
        (CHAT, {"stop": ["a"] * 33}), (CHAT, {"stop": [""]}), (CHAT, {"stop": "x" * 129}), (CHAT, {"stop": [1]}),
        (CHAT, {"logit_bias": {"a": 1}}), (CHAT, {"logit_bias": {"-1": 1}}), (CHAT, {"logit_bias": {"1": 101}}),
        (CHAT, {"logit_bias": {str(i): 0 for i in range(301)}}), (CHAT, {"logit_bias": {"1" * 5000: 1}}),
        (CHAT, {"stream": "yes"}), (CHAT, {"stream_options": 1}), (CHAT, {"logprobs": 3}), (CHAT, {"top_logprobs": 2}),
        (CHAT, {"response_format": {"type": "xml"}}), (CHAT, {"response_format": "json"}),
        (CHAT, {"response_format": {"type": "json_schema"}}), (CHAT, {"tools": [{"type": "function"}]}),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}), (CHAT, {"tool_choice": "always"}),
        (CHAT, {"response_format": {"type": "json_schema",
                                    "json_schema": {"name": "a", "schema": {"$ref": "#/none"}}}}),
        (CHAT, {"response_format": {"type": "json_schema",
                                    "json_schema": {"name": "a", "schema": {"type": "string", "pattern": "(" * 500}}}}),
        (CHAT, {"response_format": {"type": "json_schema",
                                    "json_schema": {"name": "a", "schema": {"description": "a" * (1 << 16)}}}}),
        (CHAT, {"begin_with_ids": [-1]}), (CHAT, {"begin_with_ids": [1 << 40]}), (CHAT, {"begin_with_ids": [99999]}),
        (CHAT, {"messages": [{"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "a", "arguments": "{"}}]}]}),
        ("/v1/completions", {"prompt": []}), ("/v1/completions", {"prompt": [[]]}),
        ("/v1/completions", {"prompt": [-1]}), ("/v1/completions", {"prompt": [1 << 31]}),
        ("/v1/completions", {"prompt": [99999]}), ("/v1/completions", {"prompt": ["a"] * 129}),
        ("/v1/completions", {"prompt": [1, "a"]}), ("/v1/completions", {"prompt": {"a": 1}}),
        ("/v1/completions", {"echo": True, "logprobs": 1}), ("/v1/completions", {"best_of": 20}),
        ("/v1/completions", {"suffix": "b"}), ("/v1/completions", {"prompt": [5] * 1024}),
        ("/v1/embeddings", {"input": [99999]}), ("/v1/embeddings", {"input": [5] * 1025}),
        ("/v1/embeddings", {"dimensions": 0}), ("/v1/embeddings", {"dimensions": 65}),
        ("/v1/embeddings", {"encoding_format": "hex"}), ("/v1/embeddings", {"input": None}),
        ("/v1/responses", {"previous_response_id": "resp_1"}), ("/v1/responses", {"input": []}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///"}]}]}),
        ("/v1/responses", {"max_output_tokens": 0}), ("/tokenize", {"text": None}), ("/tokenize", {"text": 1}),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}),
    ]  # fmt: skip
    for path, fields in others:
        yield path, {**ROUTES[path], **fields}


RAW, FIELDS = list(raw_bodies()), list(bad_fields())


def refused(answer: httpx.Response) -> replies.Fault:
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:200])
    assert answer.headers["content-type"] == "application/json"
    return replies.Error.model_validate(answer.json(), strict=True).error


def test_there_are_as_many_as_readme_says() -> None:
    assert len(RAW) + len(FIELDS) == 415


def test_every_bad_body_is_refused_and_harms_nobody(running: Running) -> None:
    sentinel = running.post(CHAT, HELLO).json()["choices"]
    with httpx.Client(base_url=running.base, timeout=30) as client:
        for number, (name, path, body) in enumerate(RAW):
            fault = refused(client.post(path, content=body, headers=JSON))
            assert fault.code == "invalid_json", (name, path, fault)
            if number % 25 == 0:
                assert client.post(CHAT, json=HELLO).json()["choices"] == sentinel
        for number, (path, wrong) in enumerate(FIELDS):
            answer = client.post(path, json=wrong)
            assert answer.status_code != 200, (path, wrong)
            fault = refused(answer)
            assert fault.message, (path, wrong)
            if number % 25 == 0:
                assert client.post(CHAT, json=HELLO).json()["choices"] == sentinel
    assert running.service.engine.scheduler.pages.taken == 0
    assert running.service.worker.pending == 0


@pytest.mark.parametrize("field", sorted({**RANGES, **CHAT_RANGES}))
def test_a_fault_names_its_field(running: Running, field: str) -> None:
    low = {**RANGES, **CHAT_RANGES}[field][0]
    fault = refused(running.post(CHAT, {**HELLO, "logprobs": True, field: low - 1}))
    assert (fault.param, fault.type, fault.code) == (field, "invalid_request_error", "invalid_value")
    assert field in fault.message


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", ""]
)
def test_only_json_is_read(running: Running, kind: str) -> None:
    """A web page elsewhere may send the others without asking first."""
    answer = httpx.post(running.base + CHAT, content=json.dumps(HELLO), headers={"content-type": kind})
    assert answer.status_code == 415
    refused(answer)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [("[" * 900 + "]" * 900, "object"), ('{"a": ' * 900 + "1" + "}" * 900, "nested"),
     ('{"a": ' * 90 + "1" + "}" * 90, "nested"), ("[1]", "object"),
     ('{"a": NaN}', "not JSON"), ('{"a": 1e999}', "not JSON"), ('{"a": "\\ud800"}', "surrogate"),
     (json.dumps({"a": "x" * (1 << 20)}), "characters")],
)  # fmt: skip
@pytest.mark.parametrize(
    "template",
    ["{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson }}{% endfor %}{{ tools }}",
     "{% for m in messages %}{{ m.content }}{% endfor %}"],
)  # fmt: skip
def test_arguments_of_a_call_are_within_the_limits_of_a_body(
    running: Running, monkeypatch: pytest.MonkeyPatch, template: str, arguments: str, why: str
) -> None:
    assert running.service.engine.tokenizer is not None
    monkeypatch.setattr(running.service.engine.tokenizer, "chat_template", template)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert why in refused(running.post(CHAT, {**HELLO, "messages": said})).message


def test_unknown_fields_are_ignored(running: Running) -> None:
    assert running.post(CHAT, {**HELLO, "service_tier": "auto", "metadata": {"a": "b"}}).status_code == 200


def test_paths_and_methods(running: Running) -> None:
    for path, method, status in (
        ("/nothing", "GET", 404), ("/v1/models/none", "GET", 404), (CHAT, "GET", 405), ("/v1/models", "POST", 405),
        ("/v1/chat/completions/", "POST", 404), ("/health", "DELETE", 405), ("/page/../app.py", "GET", 404),
        ("/page/%2e%2e/app.py", "GET", 404), ("/page/index.html", "GET", 404),
    ):  # fmt: skip
        answer = httpx.request(method, running.base + path)
        assert answer.status_code == status, path
        refused(answer)


def test_an_error_of_the_servers_own_tells_nothing(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("the secret path /home/someone")

    monkeypatch.setattr(running.service.engine, "prepare", fail)
    answer = running.post(CHAT, HELLO)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert replies.Error.model_validate(answer.json()).error.type == "server_error"
    assert answer.headers["x-request-id"]
