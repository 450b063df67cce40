"""What OpenAI's own client makes of our answers."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import openai
import pytest
import torch

from camelid.generate.engine import Engine
from camelid.generate.sampling import SamplingParams
from camelid.serve import replies
from camelid.serve.faults import Fault

from .conftest import CHAT, HELLO, Running, serving

MESSAGES: Any = HELLO["messages"]


def ids_of(engine: Engine) -> list[int]:
    assert engine.tokenizer is not None
    ids: list[int] = engine.tokenizer.apply_chat_template(MESSAGES)
    return ids


def test_a_chat_is_the_engines_text(running: Running, engine: Engine) -> None:
    answer = running.client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=20)
    [wanted] = engine.generate([ids_of(engine)], SamplingParams(max_new_tokens=20))
    assert answer.choices[0].message.content == wanted.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == wanted.prompt_tokens
    assert answer.usage.completion_tokens == len(wanted.ids) == 20
    assert answer.usage.total_tokens == wanted.prompt_tokens + 20


def test_a_stream_is_the_whole(running: Running) -> None:
    asked: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0.8, "seed": 7, "max_tokens": 30, "n": 3}
    whole = running.client.chat.completions.create(**asked)
    texts, reasons = ["", "", ""], ["", "", ""]
    usage = None
    stream = running.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert len(set(texts)) == 3  # a seed of its own for each
    assert [c.message.content for c in running.client.chat.completions.create(**asked).choices] == texts


def test_logprobs(running: Running, engine: Engine) -> None:
    asked: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    answer = running.client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    [wanted] = engine.generate([ids_of(engine)], SamplingParams(max_new_tokens=12, logprobs=3))
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert wanted.logprobs is not None
    assert [one.logprob for one in logprobs.content] == [one.logprob for one in wanted.logprobs]
    joined = b"".join(bytes(one.bytes or []) for one in logprobs.content)
    assert joined.decode("utf-8", "replace") == answer.choices[0].message.content
    for one in logprobs.content:
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].logprob == one.logprob  # greedy takes the likeliest
    streamed: list[float] = []
    for chunk in running.client.chat.completions.create(**asked, logprobs=True, stream=True):
        found = chunk.choices[0].logprobs
        streamed += [one.logprob for one in (found.content or [])] if found else []
    assert streamed == [one.logprob for one in logprobs.content]


def test_the_end_token_is_not_among_the_tokens(running: Running, engine: Engine) -> None:
    [end, *_] = engine.stop_ids
    bias: Any = {str(end): 100}
    answer = running.client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, logit_bias=bias, logprobs=True
    )
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", "")
    assert choice.logprobs is not None
    assert choice.logprobs.content == []


def test_stop_strings_do_not_show(running: Running) -> None:
    asked: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 40}
    whole = running.client.chat.completions.create(**asked).choices[0].message.content or ""
    stop = whole[9:12]
    stopped = running.client.chat.completions.create(**asked, stop=[stop]).choices[0]
    assert stopped.message.content == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in running.client.chat.completions.create(**asked, stop=stop, stream=True)
    ]
    assert "".join(pieces) == stopped.message.content


def test_an_answer_goes_on_from_given_ids(running: Running, engine: Engine) -> None:
    """As the glass box asks: the same beginning gives the same end, another token another one."""
    asked: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0}
    whole = running.post(CHAT, {**asked, "max_tokens": 12, "logprobs": True}).json()["choices"][0]
    ids = [one["token_id"] for one in whole["logprobs"]["content"]]
    rest = running.post(CHAT, {**asked, "max_tokens": 7, "logprobs": True, "begin_with_ids": ids[:5]}).json()[
        "choices"
    ][0]
    assert [one["token_id"] for one in rest["logprobs"]["content"]] == ids[5:]


def test_a_schema_is_kept(running: Running) -> None:
    schema: Any = {
        "type": "object", "properties": {"name": {"enum": ["a", "b"]}, "count": {"type": "integer", "maximum": 99}},
        "required": ["name", "count"], "additionalProperties": False,
    }  # fmt: skip
    answer = running.client.chat.completions.create(
        model="tiny", messages=MESSAGES, seed=1, max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}},
    )  # fmt: skip
    value = json.loads(answer.choices[0].message.content or "")
    assert value["name"] in ("a", "b")
    assert isinstance(value["count"], int)
    assert answer.choices[0].finish_reason == "stop"


TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name, "description": "it does",
            "parameters": {
                "type": "object", "properties": {"city": {"enum": ["Paris", "北京"]}}, "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "time_of_day")
]  # fmt: skip


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "time_of_day"}}])
def test_a_demanded_call(running: Running, choice: Any) -> None:
    asked: Any = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "seed": 3}
    answer = running.client.chat.completions.create(**asked).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    assert answer.message.tool_calls
    call: Any = answer.message.tool_calls[0]
    assert (
        call.function.name == "time_of_day"
        if isinstance(choice, dict)
        else call.function.name in ("weather", "time_of_day")
    )
    assert json.loads(call.function.arguments)["city"] in ("Paris", "北京")

    name, arguments, reason, starts = "", "", "", 0
    for chunk in running.client.chat.completions.create(**asked, stream=True):
        delta, reason = chunk.choices[0].delta, chunk.choices[0].finish_reason or reason
        assert not delta.content
        for piece in delta.tool_calls or []:
            starts += piece.id is not None
            assert piece.function is not None
            name += piece.function.name or ""
            arguments += piece.function.arguments or ""
    assert (name, json.loads(arguments), reason, starts) == (
        call.function.name, json.loads(call.function.arguments), "tool_calls", 1,
    )  # fmt: skip
    # What came of it can be told, and the conversation goes on.
    told: Any = [*MESSAGES, answer.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "12°"}]
    assert running.client.chat.completions.create(model="tiny", messages=told, tools=TOOLS, max_tokens=3)


def test_a_model_may_call_or_speak(running: Running) -> None:
    """With tool_choice auto a random model speaks; its text then comes as it is, streamed or not."""
    asked: Any = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "temperature": 0, "max_tokens": 9}
    answer = running.client.chat.completions.create(**asked).choices[0]
    assert answer.message.tool_calls is None
    pieces = [c.choices[0].delta.content or "" for c in running.client.chat.completions.create(**asked, stream=True)]
    assert "".join(pieces) == answer.message.content


def test_completions(running: Running, engine: Engine) -> None:
    asked: Any = {"model": "tiny", "temperature": 0, "max_tokens": 10}
    prompts = ["The meaning", "def area("]
    answer = running.client.completions.create(prompt=prompts, **asked)
    wanted = engine.generate(prompts, SamplingParams(max_new_tokens=10))
    assert [choice.text for choice in answer.choices] == [one.text for one in wanted]
    echoed = running.client.completions.create(prompt=prompts[0], echo=True, **asked)
    assert echoed.choices[0].text == prompts[0] + wanted[0].text
    assert engine.tokenizer is not None
    by_ids = running.client.completions.create(prompt=engine.tokenizer.encode(prompts[0]), logprobs=2, **asked)
    assert by_ids.choices[0].text == wanted[0].text
    assert by_ids.choices[0].logprobs is not None
    assert len(by_ids.choices[0].logprobs.tokens or []) == 10 - (wanted[0].finish_reason == "eos")
    text = "".join(
        c.choices[0].text for c in running.client.completions.create(prompt=prompts[0], stream=True, **asked)
    )
    assert text == wanted[0].text


def test_the_best_of_several(running: Running, engine: Engine) -> None:
    asked: Any = {"model": "tiny", "temperature": 1.5, "max_tokens": 12, "seed": 3}
    params = SamplingParams(max_new_tokens=12, temperature=1.5, seed=3)
    answer = running.client.completions.create(prompt=["The meaning", "def area("], n=2, best_of=5, **asked)
    wanted = [r for p in ("The meaning", "def area(") for r in engine.several(p, params, 2, best_of=5)]
    assert [choice.text for choice in answer.choices] == [one.text for one in wanted]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens > sum(len(one.ids) for one in wanted)  # all that were drawn
    with_logprobs = running.client.completions.create(prompt="The meaning", best_of=5, logprobs=0, **asked)
    assert with_logprobs.choices[0].text == wanted[0].text
    found = with_logprobs.choices[0].logprobs
    assert found is not None
    assert len(found.token_logprobs or []) == len(wanted[0].ids) - (wanted[0].finish_reason == "eos")
    for wrong in ({"n": 3, "best_of": 2}, {"best_of": 2, "stream": True}):
        with pytest.raises(openai.BadRequestError) as caught:
            running.client.completions.create(prompt="The meaning", **(asked | wrong))
        assert caught.value.param == "best_of"


@pytest.mark.parametrize("allowed", [False, True])
def test_what_a_completions_text_spells_is_a_control_token_only_where_the_server_says_so(
    engine: Engine, allowed: bool
) -> None:
    assert engine.tokenizer is not None
    text = "The <|eot_id|> meaning"
    special = set(engine.tokenizer.special_tokens)
    with serving(engine, control_tokens=allowed) as server:
        ids = server.post("/tokenize", {"text": text}).json()["ids"]
        assert bool(special & set(ids[1:])) is allowed
        assert ids == engine.tokenizer.encode(text, parse_special=allowed)
        asked = {"model": "tiny", "prompt": text, "max_tokens": 6, "temperature": 0}
        found = server.post("/v1/completions", asked).json()
        assert found["usage"]["prompt_tokens"] == len(ids)
        [wanted] = engine.generate([ids], SamplingParams(max_new_tokens=6))
        assert found["choices"][0]["text"] == wanted.text


def test_embeddings(running: Running, engine: Engine) -> None:
    texts = ["The meaning of life", "def area(width)", "骆驼"]
    answer = running.client.embeddings.create(model="tiny", input=texts)  # the client asks for base64
    found = torch.tensor([one.embedding for one in answer.data])
    assert torch.equal(found, engine.embed(texts))
    many = [[1] * 100] * (1 + 16 * engine.context_length // 100)
    refused = running.post("/v1/embeddings", {"model": "tiny", "input": many})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "request_too_large")
    plain = running.post("/v1/embeddings", {"model": "tiny", "input": texts[0], "encoding_format": "float"}).json()
    assert plain["data"][0]["embedding"] == pytest.approx(found[0].tolist(), rel=1e-6)
    assert found.norm(dim=1).tolist() == pytest.approx([1, 1, 1], rel=1e-5)
    short = running.post(
        "/v1/embeddings", {"model": "tiny", "input": texts[0], "dimensions": 8, "encoding_format": "base64"}
    )
    packed = np.frombuffer(base64.b64decode(short.json()["data"][0]["embedding"]), dtype=np.float32)
    assert len(packed) == 8
    assert float((packed**2).sum()) == pytest.approx(1)


def test_responses(running: Running, engine: Engine) -> None:
    [wanted] = engine.generate([ids_of(engine)], SamplingParams(max_new_tokens=9))
    asked: Any = {"model": "tiny", "input": MESSAGES, "temperature": 0, "max_output_tokens": 9}
    answer = running.client.responses.create(**asked)
    assert (answer.output_text, answer.status) == (wanted.text, "incomplete")
    assert answer.usage is not None
    assert answer.usage.output_tokens == 9
    text, last = "", None
    for event in running.client.responses.create(**asked, stream=True):
        last = event
        if event.type == "response.output_text.delta":
            text += event.delta
    assert text == wanted.text
    assert last is not None
    assert last.type == "response.incomplete"


def test_tokenize(running: Running, engine: Engine) -> None:
    assert engine.tokenizer is not None
    found = running.post("/tokenize", {"text": "Café 骆驼"}).json()
    assert found["ids"] == engine.tokenizer.encode("Café 骆驼")
    assert found["count"] == len(found["ids"]) == len(found["tokens"])
    assert running.post("/tokenize", {"messages": MESSAGES}).json()["ids"] == ids_of(engine)
    called = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    for messages in (
        [{"role": "developer", "content": "Be brief."}, *MESSAGES],
        [
            *MESSAGES,
            {"role": "assistant", "tool_calls": [called]},
            {"role": "tool", "content": "2"},
        ],
    ):
        usage = running.post(CHAT, {"model": "tiny", "messages": messages, "max_tokens": 1}).json()["usage"]
        assert running.post("/tokenize", {"messages": messages}).json()["count"] == usage["prompt_tokens"]


def test_tokens_that_are_a_part_of_a_character(running: Running) -> None:
    """OpenAI writes them as bytes, each its own key; offsets are those of the text."""
    bias = {str(i): 100 for i in range(200, 230)}  # single bytes beyond ASCII
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 12, "logprobs": 5, "temperature": 1, "logit_bias": bias}
    tokens = []
    for seed in range(6):
        found = running.post("/v1/completions", {**asked, "seed": seed}).json()["choices"][0]
        logprobs = found["logprobs"]
        tokens += logprobs["tokens"]
        assert {len(top) for top in logprobs["top_logprobs"]} == {5}
        assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
        assert logprobs["text_offset"][-1] <= len(found["text"])
        # Streamed, what a stop string held back is told later than its tokens; the places are the same.
        stop = [found["text"][len(found["text"]) // 2 :][:2] or "x", "never"]
        whole = running.post("/v1/completions", {**asked, "seed": seed, "stop": stop}).json()["choices"][0]["logprobs"]
        events = running.post("/v1/completions", {**asked, "seed": seed, "stop": stop, "stream": True}).text.split(
            "\n\n"
        )
        pieces = [json.loads(e.removeprefix("data: "))["choices"][0]["logprobs"] for e in events if "choices" in e]
        assert [n for piece in pieces if piece for n in piece["text_offset"]] == whole["text_offset"]
    assert any(token.startswith("bytes:\\x") for token in tokens)


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        (CHAT, {**HELLO, "n": 2, "logprobs": True, "top_logprobs": 2}, replies.ChatCompletion),
        (CHAT, {**HELLO, "tools": TOOLS, "tool_choice": "required"} | {"max_tokens": 60}, replies.ChatCompletion),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "logprobs": 1}, replies.Completion),
        ("/v1/embeddings", {"model": "tiny", "input": ["a", "b"]}, replies.Embeddings),
        ("/v1/responses", {"model": "tiny", "input": "a", "max_output_tokens": 2}, replies.Response),
        ("/tokenize", {"text": "a"}, replies.Tokens),
    ],
)
def test_answers_are_as_described(running: Running, path: str, body: Any, kind: type[replies.Reply]) -> None:
    answer = running.post(path, body)
    assert answer.status_code == 200
    kind.model_validate(answer.json(), strict=True)


@pytest.mark.parametrize(
    ("asked", "kind", "param"),
    [
        ({"temperature": 9.0}, openai.BadRequestError, "temperature"),
        ({"model": "another"}, openai.NotFoundError, "model"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"logit_bias": {"99999": 1}}, openai.BadRequestError, None),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, openai.BadRequestError, "prompt"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
         openai.BadRequestError, None),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused(running: Running, asked: Any, kind: Any, param: str | None, stream: bool) -> None:
    with pytest.raises(kind) as caught:
        running.client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **asked}, stream=stream)
    assert caught.value.param == param
    assert isinstance(caught.value.code, str)
    assert caught.value.type


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError), (401, openai.AuthenticationError), (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError), (409, openai.ConflictError), (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError), (500, openai.InternalServerError), (503, openai.InternalServerError),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_every_status_is_its_exception(
    running: Running, monkeypatch: pytest.MonkeyPatch, status: int, kind: Any, stream: bool
) -> None:
    def refuse(*_: Any) -> None:
        raise Fault(status, "told", "temperature", "a_code")

    monkeypatch.setattr(running.service.engine, "prepare", refuse)
    with pytest.raises(kind) as caught:
        running.client.chat.completions.create(**HELLO, stream=stream)
    assert caught.value.status_code == status
    assert (caught.value.param, caught.value.code) == ("temperature", "a_code")
    assert caught.value.message
