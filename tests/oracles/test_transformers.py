"""Our LLaMA against transformers': logits and gradients over the axes of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from camelid.formats.hf import hf_name
from camelid.generate.cache import KVCache
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip
HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
CASES = [
    pytest.param(rope, heads, tied, id=f"{rope}-{heads}-{'tied' if tied else 'untied'}")
    for rope in ROPES for heads in HEADS for tied in (False, True)
]  # fmt: skip
EXTRA = {
    "head_dim": {"head_dim": 24},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "theta": {"rope_theta": 500000.0},
    "one_layer": {"num_hidden_layers": 1},
}


def pair(fields: dict[str, Any], dtype: torch.dtype) -> tuple[Llama, Any]:
    """Our model and transformers', with the same random weights."""
    ours = Llama(LlamaConfig.from_dict(fields))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.2)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields, attn_implementation="sdpa"))
    state = {hf_name(name): p.detach().clone() for name, p in ours.named_parameters()}
    if fields.get("tie_word_embeddings"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state)
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def fields_of(rope: str, heads: str, tied: bool) -> dict[str, Any]:
    parameters = {"rope_theta": 10000.0} | ROPES[rope]
    return BASE | {"num_key_value_heads": HEADS[heads], "tie_word_embeddings": tied, "rope_parameters": parameters}


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, BASE["vocab_size"], (2, length), generator=torch.Generator().manual_seed(2))


def compare(fields: dict[str, Any], length: int) -> None:
    ids = tokens(length)
    ours, theirs = pair(fields, torch.float64)
    mine, reference = ours(ids).logits, theirs(ids).logits
    assert mine.abs().max() > 0.1
    assert (mine - reference).abs().max() <= 1e-10
    for logits in (mine, reference):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - gradients[hf_name(name)]).abs().max() <= 1e-9, name


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize(("rope", "heads", "tied"), CASES)
@pytest.mark.parametrize("length", [20, 100])  # within and past the trained context of 64
def test_float64(rope: str, heads: str, tied: bool, length: int) -> None:
    compare(fields_of(rope, heads, tied), length)


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("name", EXTRA)
def test_float64_other_axes(name: str) -> None:
    compare(BASE | {"num_key_value_heads": 2} | EXTRA[name], 20)


@pytest.mark.parametrize(("rope", "heads", "tied"), CASES)
def test_float32(rope: str, heads: str, tied: bool) -> None:
    ours, theirs = pair(fields_of(rope, heads, tied), torch.float32)
    ids = tokens(40)
    with torch.inference_mode():
        reference, mine = theirs(ids).logits, ours(ids).logits
    assert (mine - reference).abs().max() <= 1e-5


@pytest.mark.parametrize(("rope", "heads", "tied"), CASES)
def test_cached_equals_uncached(rope: str, heads: str, tied: bool) -> None:
    ours, _ = pair(fields_of(rope, heads, tied), torch.float64)
    ids = tokens(90)[:1]
    cache = KVCache(ours.config)
    cache.select([0], [[2, 0, 1]])
    parts = [(0, 30), (30, 31), (31, 60), (60, 61), (61, 90)]
    if rope == "dynamic":  # past the trained 64 its frequencies depend on when a token was read
        parts = parts[:4]
    with torch.inference_mode():
        for start, end in parts:
            last = ours(ids[:, start:end], cache=cache).logits[0, -1]
            whole = ours(ids[:, :end]).logits[0, -1]
            assert (last - whole).abs().max() <= 1e-12, (start, end)


def test_a_wrong_rope_would_be_noticed() -> None:
    """The comparison is sharp: forgetting llama3 scaling moves the logits far past the tolerance."""
    fields = fields_of("llama3", "gqa", False)
    right, _ = pair(fields, torch.float64)
    wrong = Llama(LlamaConfig.from_dict(fields_of("default", "gqa", False))).double()
    wrong.load_state_dict(right.state_dict())
    ids = tokens(60)
    assert (right(ids).logits - wrong(ids).logits).abs().max() > 1e-3
