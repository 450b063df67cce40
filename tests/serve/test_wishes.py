"""What a request wishes for reaches the engine, each by its name; what it leaves out is OpenAI's default."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from camelid.generate.sampling import SamplingParams

from .conftest import CHAT, HELLO, Running

WISHES: dict[str, Any] = {
    "temperature": 0.9, "top_k": 31, "top_p": 0.81, "min_p": 0.02, "typical_p": 0.83, "repetition_penalty": 1.1,
    "presence_penalty": 0.4, "frequency_penalty": -0.3, "seed": 12, "stop": ["one", "two"], "lookup": 3,
}  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO["messages"]}, "/v1/completions": {"prompt": "The meaning"},
}  # fmt: skip


@pytest.fixture
def asked(running: Running, monkeypatch: pytest.MonkeyPatch) -> list[SamplingParams]:
    """What the engine is asked for."""
    found: list[SamplingParams] = []
    prepare = running.service.engine.prepare

    def prepared(prompt: Any, params: SamplingParams, *rest: Any) -> Any:
        found.append(params)
        return prepare(prompt, replace(params, max_new_tokens=1), *rest)

    monkeypatch.setattr(running.service.engine, "prepare", prepared)
    return found


@pytest.mark.parametrize("path", BODIES)
def test_every_wish_has_its_place(running: Running, asked: list[SamplingParams], path: str) -> None:
    body = {"model": "tiny", **BODIES[path], **WISHES, "logit_bias": {"7": -2.5}, "max_tokens": 5}
    assert running.post(path, body).status_code == 200
    assert asked == [SamplingParams(**WISHES, logit_bias={7: -2.5}, max_new_tokens=5)]


def test_what_is_left_out_is_openais_default(running: Running, asked: list[SamplingParams]) -> None:
    for path, body in BODIES.items():
        assert running.post(path, {"model": "tiny", **body}).status_code == 200
    chat, completion = asked
    assert completion == SamplingParams(temperature=1.0, max_new_tokens=16)
    assert chat == SamplingParams(temperature=1.0, max_new_tokens=running.service.engine.context_length)


def test_a_seed_below_nothing_is_one(running: Running, asked: list[SamplingParams]) -> None:
    """OpenAI's seeds are signed; each of several texts has one of its own."""
    body = {"model": "tiny", **BODIES[CHAT], "seed": -1, "n": 3}
    assert running.post(CHAT, body).status_code == 200
    assert [params.seed for params in asked] == [2**63 - 1, 0, 1]
