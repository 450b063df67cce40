"""Dynamic RoPE, whose rotations depend on how much of a text is known: no neighbour and no guess changes them."""

from __future__ import annotations

import dataclasses

import torch

from camelid.generate.runner import TorchRunner
from camelid.generate.sampling import SamplingParams
from camelid.model.config import RopeScaling
from camelid.model.llama import Llama

from .test_scheduler import CONFIG, engine, prompts


def stretched(trained: int) -> Llama:
    """A model of dynamic RoPE with sharp attention."""
    torch.manual_seed(0)
    scaling = RopeScaling("dynamic", factor=4.0)
    model = Llama(dataclasses.replace(CONFIG, rope_scaling=scaling, max_position_embeddings=trained)).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3) if weight.dim() > 1 else None
    return model


def test_dynamic_rope_depends_on_its_own_text_alone() -> None:
    model = stretched(128)
    busy, params = engine(TorchRunner(model)), SamplingParams(max_new_tokens=1)
    long = prompts(1, seed=4)[0] * 12
    for prompt in (long[:400], long[:100], long[:300]):
        with torch.inference_mode():
            expected = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
        assert busy.generate([prompt, long[:7]], params)[0].ids == [expected]


def test_dynamic_rope_is_not_guessed_at() -> None:
    """A guess is read together with what follows it, by another rotation than alone: the text would change."""
    model = stretched(64)
    asked = [p[:12] * 6 for p in prompts(5, seed=2)]
    plain, guessed = (
        engine(TorchRunner(model)).generate(asked, SamplingParams(max_new_tokens=60, ignore_eos=True, lookup=lookup))
        for lookup in (0, 8)
    )
    assert [r.ids for r in guessed] == [r.ids for r in plain]
