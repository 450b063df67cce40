"""Adapters as models of their own, and texts that are embedded."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from camelid.generate.engine import Engine
from camelid.generate.sampling import SamplingParams

from .conftest import CHAT, Running
from .test_openai import MESSAGES, ids_of


def test_an_adapter_is_a_model(adapted: Running) -> None:
    names = [model.id for model in adapted.client.models.list()]
    assert names == ["tiny", "other"]
    said, engine = set(), adapted.service.engine
    asked: Any = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    for name, adapter in (("tiny", None), ("other", "other")):
        [wanted] = engine.generate([ids_of(engine)], SamplingParams(max_new_tokens=12, adapter=adapter))
        said.add(wanted.text)
        assert adapted.client.chat.completions.create(model=name, **asked).choices[0].message.content == wanted.text
        answer = adapted.client.responses.create(model=name, input=MESSAGES, temperature=0, max_output_tokens=12)
        assert answer.output_text == wanted.text
        vector = adapted.client.embeddings.create(model=name, input="camel", encoding_format="float").data[0].embedding
        assert vector == pytest.approx(engine.embed(["camel"], adapter)[0].tolist(), abs=1e-5)
    assert len(said) == 2


def test_embedded_texts_are_counted(running: Running, engine: Engine) -> None:
    def counted() -> float:
        metrics = httpx.get(f"{running.base}/metrics").text
        return float(re.findall(r"^camelid_prompt_tokens_total (.*)$", metrics, re.M)[0])

    assert engine.tokenizer is not None
    before = counted()
    running.client.embeddings.create(model="tiny", input="camel")
    assert counted() - before == len(engine.tokenizer.encode("camel"))


def test_an_adapter_of_another_template_does_not_chat_in_its_bases(
    adapted: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Any = {"messages": MESSAGES, "max_tokens": 2}
    monkeypatch.setattr(adapted.service.engine, "other_templates", frozenset({"other"}))
    refused = adapted.post(CHAT, {"model": "other", **asked})
    assert (refused.status_code, "chat template that is not its base's" in refused.text) == (400, True)
    assert adapted.post(CHAT, {"model": "tiny", **asked}).status_code == 200
    assert adapted.post("/v1/completions", {"model": "other", "prompt": "a", "max_tokens": 2}).status_code == 200
