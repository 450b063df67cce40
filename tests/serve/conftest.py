"""A server with a tiny model, in this process, on a free port."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from openai import OpenAI

from camelid.generate.engine import Engine
from camelid.model.lora import LoraConfig, adapt, use_adapter
from camelid.serve.app import Service, app_of
from camelid.serve.auth import Keys
from camelid.serve.limits import Limits
from camelid.serve.run import configured, listen
from camelid.tokenizer.tokenizer import Tokenizer

from ..conftest import tiny_model

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {
    "model": "tiny", "messages": [{"role": "user", "content": "The meaning of life"}], "temperature": 0,
    "max_tokens": 8,
}  # fmt: skip
ENDLESS: dict[str, Any] = {"logit_bias": {"1": -100}}  # never the end token


class Running:
    """A server and what it serves."""

    def __init__(self, service: Service, port: int) -> None:
        self.service, self.port, self.base = service, port, f"http://127.0.0.1:{port}"

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(self.base + path, json=body, timeout=60, **more)

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.base}/v1", api_key="a-key-that-is-long-enough", max_retries=0, timeout=60)


@contextmanager
def serving(
    engine: Engine, keys: Keys | None = None, limits: Limits | None = None, control_tokens: bool = False,
    origins: Sequence[str] = (),
) -> Iterator[Running]:  # fmt: skip
    service = Service(engine, "tiny", keys or Keys(variable="CAMELID_NO_KEY"), limits, control_tokens)
    bound = listen("127.0.0.1", 0)
    server = uvicorn.Server(configured(app_of(service, origins=origins, quiet=True), service.limits))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield Running(service, bound.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def engine(folder: Path) -> Engine:
    return Engine.from_pretrained(folder, threads=1)


@pytest.fixture(scope="session")
def running(engine: Engine) -> Iterator[Running]:
    with serving(engine) as server:
        yield server


@pytest.fixture(scope="session")
def adapted(chat_tokenizer: Tokenizer) -> Iterator[Running]:
    """A model with an adapter that changes what it says."""
    model = tiny_model(chat_tokenizer)
    adapt(model, LoraConfig(r=4), "other")
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.5)
    use_adapter(model, None)
    with serving(Engine(model, chat_tokenizer)) as server:
        yield server
