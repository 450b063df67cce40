"""Where a model runs: what a GPU holds goes there, and who asks for one that is not there is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from camelid.cli import run
from camelid.errors import InputError
from camelid.formats.hf import save
from camelid.generate import place
from camelid.generate.engine import Engine
from camelid.generate.native import NativeRunner
from camelid.generate.place import bytes_to_run, runner_for, takes_gpu, weight_bytes
from camelid.generate.runner import TorchRunner
from camelid.kernels.library import library
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.quantized import quantize_head, quantize_layers

CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with room for 800 bytes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(place, "free_on_gpu", lambda: 1000)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not takes_gpu(1, "auto")
    assert not takes_gpu(1, "cpu")
    with pytest.raises(InputError, match="torch sees no GPU: camelid doctor"):
        takes_gpu(1, "cuda")


def test_a_gpu_takes_what_it_holds(gpu: None) -> None:
    assert takes_gpu(800, "auto")
    assert not takes_gpu(801, "auto")
    assert takes_gpu(800, "cuda")
    assert not takes_gpu(1, "cpu")
    with pytest.raises(InputError, match=r"quantization int8 or int4, or on the CPU"):
        takes_gpu(801, "cuda")
    with pytest.raises(InputError, match="'gpu'; it can be auto, cpu, cuda"):
        takes_gpu(1, "gpu")


@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_is_weighed_as_it_will_be(bits: int, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded weights, and a tied projection once."""
    model, asked = Llama(CONFIG).bfloat16(), []
    assert weight_bytes(model) == 2 * CONFIG.num_parameters()
    monkeypatch.setattr(place, "takes_gpu", lambda weights, device: asked.append((weights, device)))
    runner_for(model, f"int{bits}", device="cuda")
    runner_for(model, None, device="auto")
    quantize_layers(model, bits)
    quantize_head(model)
    assert asked[0] == (pytest.approx(weight_bytes(model), rel=0.01), "cuda")
    assert asked[1] == (2 * CONFIG.num_parameters(), "auto")


def test_on_a_cpu_natively_where_that_is_built() -> None:
    model = Llama(CONFIG).eval()
    assert isinstance(runner_for(model), NativeRunner if library() is not None else TorchRunner)
    assert isinstance(runner_for(model.double()), TorchRunner)


@pytest.mark.skipif(library() is None, reason="the native library is not built")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_what_a_model_takes_is_told_before(bits: int | None, tied: bool) -> None:
    model = Llama(replace(CONFIG, vocab_size=320, intermediate_size=128, tie_word_embeddings=tied)).bfloat16()
    held = NativeRunner(model, bits).weight_bytes + model.embed_tokens.weight.nbytes
    assert bytes_to_run(model.config, 2, bits) == pytest.approx(held, rel=0.02)  # norms are in float32


def test_from_the_command_line(
    tmp_path: Path, tokenizers: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    save(Llama(replace(CONFIG, vocab_size=400)), tmp_path / "model")
    for file in tokenizers["byte-level"].iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    assert run(["generate", str(tmp_path / "model"), "The", "--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert "on cpu" in repr(Engine(TorchRunner(Llama(CONFIG))))
