"""The losses are the papers' formulas on whole logits, to 1e-9; batches cut in any way give one gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from camelid.finetune.conversation import Example
from camelid.finetune.pack import PackedExamples
from camelid.finetune.preference import FACTS, GOOD, REFERENCE, Preference, answer_log_probs, measured, scores
from camelid.finetune.reference import reference_facts
from camelid.model.llama import Llama
from camelid.model.lora import LoraConfig, adapt
from camelid.recipe import FinetuneSection, TrainSection
from camelid.tokens.batch import IGNORE
from camelid.train.parallel import Ranks
from camelid.train.step import train_step


def examples(count: int = 5) -> list[tuple[Example, Example]]:
    """Pairs of documents of unlike lengths with a common beginning."""
    draw = torch.Generator().manual_seed(7)

    def some(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(3, 300, (size,), generator=draw).tolist()

    found = []
    for _ in range(count):
        asked = some(2, 6)
        chosen, rejected = (Example([*asked, *said], [IGNORE] * len(asked) + said) for said in (some(1, 9), some(1, 9)))
        found.append((chosen, rejected))
    return found


def starts(source: PackedExamples) -> dict[tuple[int, int], int]:
    """Where each document stands in its row: RoPE's tables are float32, so 1e-9 asks for the same positions."""
    found = {}
    for row in source.rows:
        at = 0
        for unit in row:
            for k, example in enumerate(source.units[unit]):
                found[unit, k] = at
                at += len(example.ids) - 1
    return found


def by_hand(model: Llama, example: Example, start: int = 0) -> Tensor:
    """log p of each answer token, from the whole logits of the document alone."""
    positions = torch.arange(start, start + len(example.ids))
    logits = model(torch.tensor([example.ids]), positions=positions).logits[0].log_softmax(-1)
    places = [n for n, label in enumerate(example.labels) if label != IGNORE]
    return torch.stack([logits[n - 1, example.labels[n]] for n in places])


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def formula(method: str, policy: list[Tensor], reference: list[Tensor], good: bool, z: Tensor) -> Tensor:
    """One pair's loss as its paper writes it (beta 0.3, gamma 0.5, KTO's weights 1.0 and 1.5)."""
    beta = 0.3
    if method == "dpo":
        r = [beta * (p.sum() - q.sum()) for p, q in zip(policy, reference, strict=True)]
        return -torch.log(sigmoid(r[0] - r[1]))
    if method == "simpo":
        return -torch.log(sigmoid(beta * policy[0].mean() - beta * policy[1].mean() - 0.5))
    if method == "orpo":
        p = [torch.exp(x.mean()) for x in policy]
        odds = [x / (1 - x) for x in p]
        return -policy[0].mean() - beta * torch.log(sigmoid(torch.log(odds[0] / odds[1])))
    r = policy[0].sum() - reference[0].sum()
    return 1.0 * (1 - sigmoid(beta * (r - z))) if good else 1.5 * (1 - sigmoid(beta * (z - r)))


def setting(method: str) -> FinetuneSection:
    return FinetuneSection.model_validate({"method": method, "beta": 0.3, "margin": 0.5, "undesirable": 1.5})


def prepared(model: Llama, method: str, good: list[bool], rows: int = 40) -> tuple[PackedExamples, Llama]:
    """Packed pairs with the reference of `model`, and a policy that has moved away from it."""
    source = PackedExamples(examples(), rows, seed=1, pad=0)
    source.facts = reference_facts(model, "x", source, good, None)
    policy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for p in policy.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return source, policy


@pytest.mark.parametrize("method", ["dpo", "orpo", "kto", "simpo"])
def test_losses_and_gradients_are_the_papers(model: Llama, method: str) -> None:
    good = [True, False, True, True, False]
    source, policy = prepared(model, method, good)
    objective = Preference(setting(method), 1)
    whole = objective.prepare(policy, source.batch(0, len(source)), Ranks())
    assert objective.count(whole) == 5
    loss = sum(objective(policy, whole.part(r, r + 1), 0.0) for r in range(len(source)))
    loss.backward()

    twin = copy.deepcopy(policy)
    twin.zero_grad()
    at = starts(source)

    def each(of: Llama) -> list[list[Tensor]]:
        return [[by_hand(of, e, at[n, k]) for k, e in enumerate(pair)] for n, pair in enumerate(examples())]

    found = each(twin)
    with torch.no_grad():
        reference = each(model)
        moved = [f[1].sum() - r[1].sum() for f, r in zip(found, reference, strict=True)]
    z = torch.stack(moved).mean().clamp(min=0)
    expected = sum(formula(method, f, r, g, z) for f, r, g in zip(found, reference, good, strict=True))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    for (name, ours), theirs in zip(policy.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() < 1e-9, name


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_cut_into_micro_batches_it_is_the_same_step(model: Llama, method: str) -> None:
    good = [True, False, True, True, False]
    found = []
    for micro in (1, 2, 9):
        source, policy = prepared(model, method, good, rows=24)
        settings = TrainSection(micro_batch_rows=micro, dtype="float32", clip=1e9)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        taken = train_step(policy, optimizer, source.batch(0, len(source)), settings, 0.1, Ranks(), (),
                           Preference(setting(method), micro))  # fmt: skip
        kept = slice(0, 1) if method == "kto" else slice(None)  # the other answers are KTO's baseline
        assert taken.supervised == sum(e.learned() for pair in examples() for e in pair[kept])
        found.append((taken.loss, policy.layers[0].mlp.up_proj.weight.detach().clone()))
    for loss, weight in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-12)
        torch.testing.assert_close(weight, found[0][1], rtol=0, atol=1e-12)


def test_the_reference_is_the_model_before(model: Llama, tmp_path: Any) -> None:
    source = PackedExamples(examples(), 40, seed=1, pad=0)
    facts = reference_facts(model, "x", source, [True] * 5, tmp_path)
    for unit, pair in enumerate(examples()):
        for k, example in enumerate(pair):
            assert float(facts[unit, k, REFERENCE]) == pytest.approx(
                float(by_hand(model, example).detach().sum()), abs=1e-6
            )
    assert (facts[..., GOOD] == 1).all()
    [kept] = tmp_path.glob("reference-*.safetensors")
    before = kept.stat().st_mtime_ns
    for p in model.parameters():
        p.data.zero_()  # what is kept is not computed again
    again = reference_facts(model, "x", source, [True] * 5, tmp_path)
    assert torch.equal(again, facts)
    assert kept.stat().st_mtime_ns == before
    reference_facts(model, "y", source, [True] * 5, tmp_path)
    assert len(list(tmp_path.glob("reference-*.safetensors"))) == 2


def test_at_the_start_nothing_is_preferred_and_training_moves_it(model: Llama) -> None:
    model = model.float()
    adapt(model, LoraConfig(r=4), seed=1)
    source = PackedExamples(examples(), 40, seed=1, pad=0)
    source.facts = reference_facts(model, "x", source, [True] * 5, None)
    objective = Preference(setting("dpo"), 2)
    batch = source.batch(0, len(source))
    start = measured(model, [batch], objective)
    assert start["margin"] == pytest.approx(0, abs=1e-5)
    assert start["loss"] == pytest.approx(0.6931, abs=1e-4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        train_step(model, optimizer, batch, TrainSection(dtype="float32"), 1e-2, Ranks(), (), objective)
    end = measured(model, [batch], objective)
    assert end["margin"] > 0.5
    assert end["accuracy"] == 1.0


def test_scores_keep_documents_apart(model: Llama) -> None:
    source, policy = prepared(model, "dpo", [True] * 5)
    batch = source.batch(0, len(source))
    sums, counts = answer_log_probs(policy, batch)
    assert int(counts.sum()) == batch.supervised()
    found = scores(policy, batch)
    assert found.sums.shape == (5, 2)
    assert found.facts.shape == (5, 2, FACTS)
    assert sums.sum().item() == pytest.approx(found.sums.sum().item())
