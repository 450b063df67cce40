"""Document isolation, RoPE's float32 table, and building on the meta device."""

from __future__ import annotations

import math

import torch

from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.rope import half_split_to_interleaved, interleaved_to_half_split, inverse_frequencies, rotation


def test_documents_do_not_see_each_other(model: Llama) -> None:
    ids = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    packed = model(ids, document_ids=documents).logits
    changed = ids.clone()
    changed[0, :5] = (changed[0, :5] + 1) % 300
    assert torch.equal(packed[0, 5:], model(changed, document_ids=documents).logits[0, 5:])
    assert not torch.equal(model(ids).logits[0, 5:], model(changed).logits[0, 5:])


def test_a_packed_document_scores_as_if_alone(model: Llama) -> None:
    ids = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    packed = model(ids, document_ids=torch.tensor([[0] * 5 + [1] * 7])).logits[0, 5:]
    alone = model(ids[:, 5:]).logits[0]  # RoPE is relative, so the offset of 5 does not matter
    assert (packed - alone).abs().max() < 1e-6


def test_rope_table_is_float32_in_a_bfloat16_model() -> None:
    config = LlamaConfig.named("llama-3.2-1b")
    turn = rotation(config, torch.tensor([100_000]))
    assert turn.cos.dtype == torch.float32
    assert turn.cos[0, 0].item() == torch.tensor(100_000.0).cos().item()


def test_llama3_frequencies_at_the_published_constants() -> None:
    """Values worked out by hand from the rule: fast pairs kept, slow ones divided by 32 (Llama 3.2 1B)."""
    config = LlamaConfig.named("llama-3.2-1b")
    frequencies, factor = inverse_frequencies(config)
    plain = [500000.0 ** (-2 * i / 64) for i in range(32)]
    assert factor == 1.0
    for i, base in enumerate(plain):
        wavelength = 2 * math.pi / base
        if wavelength < 8192 / 4:
            expected = base
        elif wavelength > 8192:
            expected = base / 32
        else:
            smooth = (8192 / wavelength - 1) / 3
            expected = (1 - smooth) * base / 32 + smooth * base
        assert abs(frequencies[i].item() - expected) <= 2e-6 * expected


def test_interleaving_is_a_bijection() -> None:
    weight = torch.arange(4 * 6 * 5.0).view(24, 5)
    assert torch.equal(half_split_to_interleaved(interleaved_to_half_split(weight, 4), 4), weight)
    assert interleaved_to_half_split(weight, 4)[:6, 0].tolist() == [0, 10, 20, 5, 15, 25]


def test_residual_projections_start_smaller(tiny: LlamaConfig) -> None:
    torch.manual_seed(0)
    first = Llama(tiny).layers[0]
    assert first.self_attn.o_proj.weight.std() < 0.7 * first.self_attn.q_proj.weight.std()  # type: ignore[union-attr,operator]
