"""Handing a model to larger servers: tools/vllm_serve.py and tools/ray_serve.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from camelid.bench.serve import free_port
from camelid.formats.adapter import write_adapter
from camelid.formats.load import load
from camelid.generate.engine import Engine, Result
from camelid.generate.sampling import SamplingParams
from camelid.model.llama import Llama
from camelid.model.lora import LoraConfig, adapt

TOOLS = Path(__file__).parents[2] / "tools"
KEY = "correct-horse-battery"


def adapter_of(model: Path, out: Path, rank: int) -> Path:
    base: Llama = load(model)
    torch.manual_seed(0)
    config = LoraConfig(r=rank)
    adapt(base, config, "default")
    learned = {name: torch.randn_like(p) * 0.2 for name, p in base.named_parameters() if ".adapters." in name}
    out.mkdir()
    write_adapter(config, learned, out, model, {})
    return out


def told(folder: Path, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """vllm_serve.py with a command in vLLM's place that writes down how it was called."""
    fake = folder / "vllm"
    fake.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], os.environ.get('VLLM_API_KEY')]))\n"
    )
    fake.chmod(0o755)
    env = {**os.environ, "CAMELID_API_KEY": KEY}
    run = [sys.executable, str(TOOLS / "vllm_serve.py"), "--vllm", str(fake), *words]
    return subprocess.run(run, capture_output=True, text=True, env=env)


def test_vllm_is_called_with_the_folder_its_name_and_its_adapters(folder: Path, tmp_path: Path) -> None:
    adapter = adapter_of(folder, tmp_path / "mine", 12)
    done = told(tmp_path, [str(folder), "--adapter", f"other={adapter}", "--", "--port", "1234"])
    assert done.returncode == 0, done.stderr
    words, key = json.loads(done.stdout)
    loopback = ["--host", "127.0.0.1"]
    lora = ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"other={adapter}"]
    assert words == ["serve", str(folder), "--served-model-name", "tiny", *loopback, *lora, "--port", "1234"]
    assert key == KEY
    alone, _ = json.loads(told(tmp_path, [str(adapter)]).stdout)
    assert alone[1:4] == [str(folder), "--served-model-name", "base"]
    assert alone[-1] == f"mine={adapter}"


def test_what_vllm_cannot_open_is_refused(folder: Path, tmp_path: Path) -> None:
    large = adapter_of(folder, tmp_path / "large", 600)
    from camelid.formats.convert import convert

    convert(folder, tmp_path / "x.gguf", "gguf")
    for words, said in (
        ([str(tmp_path / "x.gguf")], "--to hf --out FOLDER"),
        ([str(folder), "--adapter", f"a={large}"], "up to rank 512"),
        ([str(folder), "--adapter", "a"], "NAME=DIR"),
        ([str(tmp_path / "nothing")], "no model at"),
        ([str(folder), "--vllm", "/nowhere/vllm"], "environment of its own"),
    ):
        done = told(tmp_path, words)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr


@contextmanager
def started(words: Sequence[str], port: int, ready: str, env: dict[str, str], log: Path) -> Iterator[None]:
    """A server by its command, until it answers on `ready`; it ends with all that it started."""
    with log.open("wb") as file:
        run = subprocess.Popen(words, stdout=file, stderr=file, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert run.poll() is None, log.read_text()[-3000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}{ready}").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        yield
    finally:
        run.terminate()
        with suppress(subprocess.TimeoutExpired):
            run.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


def asked(port: int, model: str, ids: list[int], key: str, **more: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "prompt": ids, "max_tokens": 12, "temperature": 0, **more}
    head = {"Authorization": f"Bearer {key}"}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, headers=head, timeout=120)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def ours(model: Path, ids: list[int]) -> Result:
    engine = Engine.from_pretrained(model, dtype=torch.float32)
    [found] = engine.generate([ids], SamplingParams(max_new_tokens=12, temperature=0))
    return found


VLLM = os.environ.get("CAMELID_VLLM") or shutil.which("vllm")


@pytest.mark.nightly
@pytest.mark.skipif(VLLM is None, reason="no vllm: pip install it elsewhere, and name its command in CAMELID_VLLM")
def test_vllm_says_what_we_say(folder: Path, tmp_path: Path) -> None:
    """The same greedy tokens from the model, and from an adapter on it."""
    assert VLLM is not None
    adapter, port = adapter_of(folder, tmp_path / "mine", 8), free_port()
    env = {**os.environ, "CAMELID_API_KEY": KEY, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    words = [sys.executable, str(TOOLS / "vllm_serve.py"), str(folder), "--adapter", f"mine={adapter}", "--vllm", VLLM]
    words += ["--", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    with started(words, port, "/health", env, tmp_path / "vllm.log"):
        for ids in ([5, 9, 200, 31, 7], [100, 101, 102], list(range(60, 100))):
            for name, model in (("tiny", folder), ("mine", adapter)):
                # Its text drops a character that the last token leaves unfinished; ids are what was computed.
                assert asked(port, name, ids, KEY, return_token_ids=True)["token_ids"] == ours(model, ids).ids
        wrong = httpx.get(f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": "Bearer wrong"})
        assert wrong.status_code == 401


@pytest.mark.nightly
@pytest.mark.skipif(find_spec("ray") is None, reason="no ray: pip install 'ray[serve]'")
def test_ray_serve_says_what_we_say(folder: Path, tmp_path: Path) -> None:
    port = free_port()
    words = [sys.executable, str(TOOLS / "ray_serve.py"), str(folder), "--replicas", "2", "--port", str(port)]
    with started(words, port, "/health", {**os.environ, "CAMELID_API_KEY": KEY}, tmp_path / "ray.log"):
        for ids in ([5, 9, 200, 31, 7], [100, 101, 102], list(range(60, 100))):
            assert asked(port, "tiny", ids, KEY)["text"] == ours(folder, ids).text
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401
