"""What is made again is bit for bit what it was, once for all that ask, and costs no memory in between."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from camelid.kernels.elementwise import rms_norm, swiglu
from camelid.kernels.remade import Again, remade, remakes
from camelid.model import lora
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.lora import LoraConfig, adapt
from camelid.recipe import TrainSection
from camelid.train.rehearse import step_memory
from camelid.train.step import autocast

CPU = torch.device("cpu")
KINDS: list[dict[str, Any]] = [
    {}, {"use_dora": True}, {"target_modules": ("q_proj", "down_proj")}, {"target_modules": ("v_proj", "up_proj")}
]  # fmt: skip


def kept(x: Tensor) -> tuple[None, tuple[()]]:
    """As if nothing were marked."""
    return None, ()


def slopes(dtype: str, kind: dict[str, Any], checkpointing: bool, passes: int = 1) -> list[Tensor]:
    torch.manual_seed(0)
    model = Llama(LlamaConfig.named("1m", vocab_size=300, num_hidden_layers=3))
    for p in model.parameters():
        if p.dim() == 1:  # a norm's weight
            torch.nn.init.uniform_(p, 0.5, 1.5)
    adapt(model, LoraConfig(r=4, **kind), seed=3)
    model.activation_checkpointing = checkpointing
    learned = [p for p in model.parameters() if p.requires_grad]
    for number, p in enumerate(learned):
        torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(number))
    ids = torch.arange(96).view(2, 48) * 7 % 300
    with autocast(CPU, dtype):
        loss = model(ids).logits.float().logsumexp(-1).sum()
    for left in reversed(range(passes)):
        loss.backward(retain_graph=left > 0)
    return [p.grad for p in learned if p.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_bits(
    dtype: str, kind: dict[str, Any], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = slopes(dtype, kind, checkpointing)
    twice = slopes(dtype, kind, False, passes=2)
    monkeypatch.setattr(lora, "remade", kept)
    wanted = slopes(dtype, kind, checkpointing)
    assert len(found) == len(wanted) > 0
    for ours, theirs, double in zip(found, wanted, twice, strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(double, 2 * theirs, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapters_step_holds_a_quarter_less(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 widths a token and layer (two of a norm, three of a gate) nearly five are made again."""
    model = Llama(LlamaConfig.named("1m", vocab_size=300, num_hidden_layers=8, hidden_size=256, intermediate_size=704))
    adapt(model.to(getattr(torch, dtype)), LoraConfig(r=1))
    settings = TrainSection(sequence_length=256, dtype=dtype)  # type: ignore[arg-type]
    found = step_memory(model, 4, 1, settings, CPU)
    monkeypatch.setattr(lora, "remade", kept)
    assert found < 0.8 * step_memory(model, 4, 1, settings, CPU)


def test_it_is_made_once_for_all_that_asked() -> None:
    made = []

    def make(x: Tensor) -> Tensor:
        made.append(1)
        return x + 1

    source = torch.ones(3)
    marked = remakes(source + 1, make, source)
    asked = [remade(marked) for _ in range(3)]
    found = [again.take(sources) for again, sources in asked if again is not None]
    assert len(made) == 1
    assert all(torch.equal(one, marked) for one in found)
    again: Again | None = asked[0][0]
    assert again is not None
    assert again._there is None


def test_a_marked_output_travels_without_its_mark() -> None:
    marked = remakes(torch.ones(3), lambda x: x, torch.ones(3))
    torch.save(marked, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False), marked)


def test_nothing_is_marked_where_nothing_is_learned() -> None:
    x, weight = torch.randn(2, 64), torch.ones(64)
    with torch.no_grad():
        assert remade(rms_norm(x, weight, 1e-5)) == (None, ())
        assert remade(swiglu(x, x)) == (None, ())
    assert remade(swiglu(x, x))[0] is not None
