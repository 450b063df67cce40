"""GRPO: its advantages and its gradient by the paper's formula, answers of the model as it is, and a model that learns
what is rewarded; stopped and resumed, the same bits."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from camelid.errors import InputError, RecipeError
from camelid.finetune import finetune, grpo, job
from camelid.finetune.grpo import Grpo, Questions, advantages, reward, seed_of, speaking
from camelid.finetune.job import planned
from camelid.finetune.material import masks, read_material
from camelid.formats import load, save
from camelid.generate.engine import Engine, Result
from camelid.generate.runner import TorchRunner
from camelid.generate.sampling import SamplingParams
from camelid.model.llama import Llama
from camelid.model.lora import LoraConfig, adapt
from camelid.model.quantized import quantize_layers
from camelid.recipe import Recipe
from camelid.tokens.order import item_at
from camelid.train.estimate import estimate
from camelid.train.parallel import Ranks

from .conftest import SAID, answers, at_random, recipe, says, written


@pytest.fixture(scope="module")
def undecided(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers each word of SAID with any of the answers."""
    folder = tmp_path_factory.mktemp("undecided")
    tokenizer = at_random(tokenizers, folder / "random")
    rows = [{"prompt": q, "completion": a} for q in SAID for a in SAID.values()]
    taught = recipe(folder / "random", written(folder / "x.jsonl", rows), folder / "run",
                    train={"steps": 120, "global_batch_tokens": 1024, "learning_rate": 3e-3})  # fmt: skip
    save(load(finetune(taught, quiet=True)["checkpoint"]), folder / "base")
    tokenizer.save(folder / "base")
    return folder / "base"


def rewarding(base: Path, files: str, out: Path, **more: Any) -> Recipe:
    train = {"steps": 4, "sequence_length": 64, "global_batch_tokens": 64 * 16} | more.pop("train", {})
    told = {"reward": "exact", "samples": 8, "max_new_tokens": 12, "adapter": "none"} | more.pop("finetune", {})
    return recipe(base, files, out, "grpo", train=train, finetune=told, **more)


def objective_of(chosen: Recipe) -> tuple[Grpo, Llama]:
    material = read_material(chosen)
    assert isinstance(material.source, Questions)
    return Grpo(material.source, material.tokenizer, material.stops, chosen), load(chosen.model.from_ or "")


def test_an_advantage_is_told_by_its_group() -> None:
    found = advantages(torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0]), 4)
    half = 0.5 / ((4 * 0.25 / 3) ** 0.5 + 1e-4)
    assert found[:4].tolist() == pytest.approx([half, -half, -half, half])
    assert found[4:8].tolist() == [0.0] * 4
    assert found[8:].tolist() == pytest.approx([0.25 / 0.5001] * 3 + [-0.75 / 0.5001])


@pytest.mark.parametrize(
    ("text", "ended", "kind", "wanted"),
    [("so it is 1,200.", "eos", "number", 1.0), ("so it is 1,200.", "max_new_tokens", "number", 0.0),
     ("it is 12 of 13", "eos", "number", 0.0), ("#### 1200", "eos", "exact", 1.0), ("1200", "eos", "exact", 0.0)],
)  # fmt: skip
def test_only_what_is_right_and_ends_is_rewarded(text: str, ended: Any, kind: str, wanted: float) -> None:
    assert reward(Result([1], text, ended, 3), "#### 1200", kind) == wanted


@pytest.mark.parametrize(("length", "temperature", "close"), [(40, 1.0, 1e-9), (40, 0.7, 1e-9), (128, 1.0, 1e-6)])
def test_the_gradient_is_the_papers(
    undecided: Path, tmp_path: Path, length: int, temperature: float, close: float
) -> None:
    """min(ratio * A, clip(ratio) * A), a mean over tokens and then over answers, at the ratio 1, of the distribution
    that the answers are drawn from; float64. Where several answers share a row they are turned by other angles, whose
    sines are in float32."""
    sizes = {"sequence_length": length, "global_batch_tokens": length * 16}
    chosen = rewarding(undecided, answers(tmp_path), tmp_path / "run", train=sizes,
                       finetune={"temperature": temperature})  # fmt: skip
    objective, model = objective_of(chosen)
    model = model.double()
    batch = objective.source.batch(0, 16)
    prepared = objective.prepare(model, batch, Ranks())
    told = dict(objective.told)
    assert 0 < told["reward"] < 1
    assert objective.count(prepared) == 16
    (objective(model, prepared, 0.0) / 16).backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    said = objective.answers(model, *asked_by(objective, batch))
    assert batch.facts is not None
    numbers = batch.facts[:, 0, 0].long().tolist()
    rewards = [float(r.finish_reason == "eos" and r.text == objective.source.asked[n].reference)
               for r, n in zip(said, numbers, strict=True)]  # fmt: skip
    assert sum(rewards) / 16 == told["reward"]
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, 16, 8):
        group = torch.tensor(rewards[first : first + 8], dtype=torch.float64)
        for n in range(first, first + 8):
            prompt = objective.source.prompts[numbers[n]]
            logits = model(torch.tensor([[*prompt, *said[n].ids]])).logits[0, len(prompt) - 1 : -1] / temperature
            logp = logits.log_softmax(-1).gather(1, torch.tensor(said[n].ids)[:, None])[:, 0]
            ratio = (logp - logp.detach()).exp()
            advantage = (rewards[n] - group.mean()) / (group.std() + 1e-4)
            total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean() / 16
    total.backward()
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    largest = max(float(other.abs().max()) for other in wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=close * largest)


def asked_by(objective: Grpo, batch: Any) -> tuple[list[list[int]], list[SamplingParams]]:
    """What `prepare` asks for a batch."""
    numbers, draws = (batch.facts[:, 0, fact].long().tolist() for fact in (0, 1))
    seed, s = objective.recipe.train.seed, objective.settings
    params = [SamplingParams(s.max_new_tokens, temperature=s.temperature, seed=seed_of(seed, n)) for n in draws]
    return [objective.source.prompts[n] for n in numbers], params


def test_a_step_in_parts_is_the_step(undecided: Path, tmp_path: Path) -> None:
    chosen = rewarding(undecided, answers(tmp_path), tmp_path / "run", train={"global_batch_tokens": 64 * 64})
    objective, model = objective_of(chosen)
    prepared = objective.prepare(model, objective.source.batch(0, 64), Ranks())
    model = model.double()
    whole = objective(model, prepared, 0.0)
    parts = sum(objective(model, prepared.part(n, n + 1), 0.0) for n in range(len(prepared.input_ids)))
    assert len(prepared.input_ids) > 2
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_questions_come_in_groups_and_each_once_an_epoch(undecided: Path, tmp_path: Path) -> None:
    objective, _ = objective_of(rewarding(undecided, answers(tmp_path), tmp_path / "run"))
    source = objective.source
    assert len(source) == 4 * 8
    for epoch in range(2):
        batch = source.batch(epoch * 32, 32)
        assert batch.facts is not None
        numbers = batch.facts[:, 0, 0].view(4, 8)
        assert (numbers == numbers[:, :1]).all()
        assert sorted(numbers[:, 0].tolist()) == [0, 1, 2, 3]
        assert batch.facts[:, 0, 1].tolist() == list(range(epoch * 32, epoch * 32 + 32))
        assert batch.supervised() == 0
    later = source.batch(5, 3)
    assert torch.equal(later.input_ids, source.batch(0, 32).input_ids[5:8])


def test_where_all_agree_nothing_is_taught(undecided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, model = objective_of(rewarding(undecided, answers(tmp_path), tmp_path / "run"))
    monkeypatch.setattr(grpo, "reward", lambda *given: 1.0)
    prepared = objective.prepare(model, objective.source.batch(0, 16), Ranks())
    objective(model, prepared, 0.0).backward()
    assert prepared.supervised() > 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    assert objective.told["groups_that_differ"] == 0


@pytest.mark.parametrize("kind", ["plain", "lora", "qlora"])
def test_what_answers_is_the_model_as_it_is(undecided: Path, kind: str) -> None:
    model = load(undecided)
    if kind == "qlora":
        quantize_layers(model, 4, 16, symmetric=False, rounds_inputs=False)
    if kind != "plain":
        adapt(model, LoraConfig(4, 8.0, ("q_proj", "down_proj")))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    prompts = [[1, 2, 3], [7, 8, 9, 10]]
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    wanted = [r.ids for r in Engine(TorchRunner(copy.deepcopy(model)), None, ()).generate(prompts, params)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        found = Engine(speaking(model, torch.float32), None, ()).generate(prompts, params)
    assert [r.ids for r in found] == wanted
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("adapter", ["none", "lora", "qlora"])
def test_what_is_rewarded_is_learned(undecided: Path, tmp_path: Path, adapter: str) -> None:
    rate = {"none": 1e-3, "lora": 5e-3, "qlora": 5e-3}[adapter]
    rows = [{"prompt": q, "completion": "moon"} for q in SAID]
    chosen = rewarding(undecided, written(tmp_path / "x.jsonl", rows * 4), tmp_path / "run", data={"held_out": 0.25},
                       train={"steps": 40, "learning_rate": rate, "global_batch_tokens": 64 * 32},
                       finetune={"adapter": adapter})  # fmt: skip
    result = finetune(chosen, quiet=True)
    held = result["held_out"]
    assert held["before"]["reward"] < 0.7
    assert held["after"]["reward"] == held["after"]["stopped_by_itself"] == 1.0
    assert says(tmp_path / "run", "ping") == ("moon", "eos")
    told = [json.loads(line).get("told") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [t["reward"] for t in told if t]
    assert len(rewards) == 40
    if adapter == "none":
        assert sum(rewards[-5:]) / 5 > sum(rewards[:2]) / 2 + 0.15
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Reward" in page
    assert "minus advantage times log-probability" in page


def test_a_resumed_run_is_the_run(undecided: Path, tmp_path: Path) -> None:
    files = answers(tmp_path)
    whole = finetune(rewarding(undecided, files, tmp_path / "whole"), quiet=True)
    finetune(rewarding(undecided, files, tmp_path / "cut"), quiet=True)
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000004")
    again = finetune(rewarding(undecided, files, tmp_path / "cut"), resume=True, quiet=True)
    assert again["digest"] == whole["digest"]


def test_answers_go_by_the_seed_and_the_place(undecided: Path, tmp_path: Path) -> None:
    """torch's generator reads the low 32 bits of a seed only."""
    seeds = {seed_of(seed, draw) % 2**32 for seed in (0, 1, -1, 2**31, 2**40) for draw in range(50)}
    assert len(seeds) == 250
    objective, model = objective_of(rewarding(undecided, answers(tmp_path), tmp_path / "run"))
    prompts = [objective.source.prompts[0]] * 8

    def drawn(seed: int, first: int) -> list[list[int]]:
        params = [SamplingParams(12, temperature=1.0, seed=seed_of(seed, first + n)) for n in range(8)]
        return [r.ids for r in objective.answers(model, prompts, params)]

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 4)[:4] == drawn(0, 0)[4:]
    assert drawn(0, 0) != drawn(1, 0) != drawn(0, 8)


def test_a_plan_covers_it(undecided: Path, tmp_path: Path) -> None:
    chosen = rewarding(undecided, answers(tmp_path), tmp_path / "run")
    said = estimate(chosen, planned)
    assert said["fits"]
    assert said["hours"] > 0
    assert "tokens/s" not in said["said"]
    rows = rewarding(undecided, answers(tmp_path), tmp_path / "run", train={"global_batch_tokens": 64 * 512})
    more = estimate(rows, planned, probe=False)["memory_bytes"]
    # Two copies in float32, and the cache of 64 texts at a time: keys and values of 64 positions, 2 layers, 64 wide.
    assert more["step"] + more["answers"] >= 8 * said["parameters"] + 64 * 64 * 2 * 2 * 64 * 4
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "why"),
    [({"train": {"global_batch_tokens": 64 * 12}}, r"12 sequences.*8 times.*set it to 1024"),
     ({"finetune": {"max_new_tokens": 60}}, "data.files has no record with an answer and.*at most 4 tokens"),
     ({"finetune": {"reward": "number"}}, "no record with an answer, with a number"),
     ({"train": {"z_loss": 1e-4}}, "z_loss")],
)  # fmt: skip
def test_what_cannot_be_run_is_refused(undecided: Path, tmp_path: Path, more: dict[str, Any], why: str) -> None:
    """Before anything is asked, or written."""
    asked = {"evaluate": {"metric": "exact", "files": [answers(tmp_path)]}}
    with pytest.raises(RecipeError, match=why):
        finetune(rewarding(undecided, answers(tmp_path), tmp_path / "run", **asked, **more), quiet=True)
    assert not (tmp_path / "run").exists()


def test_there_is_no_mask_to_show(undecided: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="own answers"):
        masks(rewarding(undecided, answers(tmp_path), tmp_path / "run"), 1, True)


def test_nothing_to_ask_along_the_way_is_refused(undecided: Path, tmp_path: Path) -> None:
    rows = [{"prompt": q, "completion": "1"} for q in SAID] + [{"prompt": "words " * 50, "completion": "1"}]
    files = written(tmp_path / "x.jsonl", rows)
    long, other = (next(s for s in range(99) if (item_at(0, 5, s) == 4) == wanted) for wanted in (True, False))
    with pytest.raises(RecipeError, match=r"data\.held_out has no record"):
        read_material(rewarding(undecided, files, tmp_path / "run", data={"held_out": 0.2}, train={"seed": long}))
    chosen = rewarding(undecided, files, tmp_path / "run", data={"held_out": 0.2}, train={"seed": other})
    counted = read_material(chosen).counted()
    assert (counted["questions"], counted["left_out"], counted["held_out_questions"]) == (3, 1, 1)


def test_several_processes_are_refused(undecided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "ranks", lambda settings: nullcontext(Ranks(world=2)))
    with pytest.raises(RecipeError, match="one process"):
        finetune(rewarding(undecided, answers(tmp_path), tmp_path / "run"), quiet=True)


def test_steps_that_tell_nothing_change_nothing_and_the_first_that_does_counts(
    undecided: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After many losses of 0 a loss above them is no spike."""
    rewards = iter([0.0] * 40 * 16 + [1.0, 0.0] * 8)
    monkeypatch.setattr(grpo, "reward", lambda *given: next(rewards))
    chosen = rewarding(undecided, answers(tmp_path), tmp_path / "run",
                       train={"steps": 41, "weight_decay": 0.1, "warmup_steps": 0})  # fmt: skip
    result = finetune(chosen, quiet=True)
    assert result["skipped_steps"] == 0
    before, after = load(undecided).state_dict(), load(result["checkpoint"]).state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    forty = load(tmp_path / "run" / "checkpoints" / "step-00000040").state_dict()
    assert all(torch.equal(forty[name], value) for name, value in before.items())
