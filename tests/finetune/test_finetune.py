"""Teaching from files to a model that answers: every method learns, resumes bit for bit, and says what it found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from camelid import Engine, SamplingParams
from camelid.cli import run as cli
from camelid.errors import FormatError, InputError, RecipeError
from camelid.evaluate.answers import last_number, same_number
from camelid.finetune import finetune
from camelid.finetune.job import checker, planned
from camelid.finetune.material import read_material
from camelid.finetune.pack import PackedExamples
from camelid.formats import load, save
from camelid.formats.load import load_tokenizer, stop_ids
from camelid.formats.merge import merge_adapter
from camelid.kernels.byte_products import Bytes, multiplies
from camelid.model.llama import Llama
from camelid.recipe import parse
from camelid.tokens.batch import Batch
from camelid.train.estimate import estimate
from camelid.train.loss import NextToken
from camelid.train.parallel import Ranks
from camelid.train.rehearse import twin

from .conftest import SAID, answers, pairs, recipe, says, verdicts, written


@pytest.mark.parametrize("method", ["full", "lora", "dora", "qlora"])
def test_it_learns_the_answers_and_to_stop(base: Path, tmp_path: Path, method: str) -> None:
    chosen = recipe(base, answers(tmp_path), tmp_path / "run", method,
                    train={"steps": 80, "learning_rate": 5e-3})  # fmt: skip
    result = finetune(chosen, quiet=True)
    assert result["examples"] == 4
    assert result["formats"] == {"prompt and completion": 4}
    assert says(tmp_path / "run", "ping") == ("pong", "eos")
    assert says(tmp_path / "run", "tick") == ("tock", "eos")
    checkpoint = Path(result["checkpoint"])
    end = load_tokenizer(base).special_tokens
    assert "<|eot_id|>" in {end[i] for i in stop_ids(checkpoint)}
    if method == "full":
        assert (checkpoint / "model.safetensors").exists()
        return
    assert not (checkpoint / "model.safetensors").exists()
    engine = Engine.from_pretrained(base, adapters={"mine": tmp_path / "run"})
    assert engine.tokenizer is not None
    asked = engine.tokenizer.apply_chat_template([{"role": "user", "content": "ping"}])
    [through] = engine.generate([asked], SamplingParams(max_new_tokens=12, adapter="mine"))
    assert (through.text, through.finish_reason) == ("pong", "eos")
    size = (checkpoint / "adapter_model.safetensors").stat().st_size
    assert size < (base / "model.safetensors").stat().st_size / 2
    merged = merge_adapter(tmp_path / "run", tmp_path / "merged")
    assert merged["largest_logit_change"] < 1e-5 * merged["largest_logit"]
    plain, adapted = load(tmp_path / "merged"), load(tmp_path / "run")
    x = torch.randint(0, 300, (1, 20))
    torch.testing.assert_close(plain(x).logits, adapted(x).logits, rtol=0, atol=1e-5 * merged["largest_logit"])
    assert not plain.adapters
    assert says(tmp_path / "merged", "ping") == ("pong", "eos")


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("lora", {}),
        ("qlora", {"finetune": {"bits": 8, "group": None}}),
        ("dpo", {}),
        ("kto", {"finetune": {"adapter": "none"}}),
    ],
)
def test_a_resumed_run_is_the_run(base: Path, tmp_path: Path, method: str, more: dict[str, Any]) -> None:
    files = {"dpo": pairs, "kto": verdicts}.get(method, answers)(tmp_path)
    whole = finetune(recipe(base, files, tmp_path / "whole", method, **more), quiet=True)
    finetune(recipe(base, files, tmp_path / "cut", method, **more), quiet=True)
    last = tmp_path / "cut" / "checkpoints" / "step-00000006"
    shutil.rmtree(last)
    again = finetune(recipe(base, files, tmp_path / "cut", method, **more), resume=True, quiet=True)
    assert again["digest"] == whole["digest"]
    for name in ("state/optimizer.safetensors", "state/random.safetensors", "state/loop.json"):
        one, other = (tmp_path / run / "checkpoints" / "step-00000006" / name for run in ("whole", "cut"))
        assert one.read_bytes() == other.read_bytes(), name


@pytest.mark.parametrize("method", ["dpo", "orpo", "simpo", "kto"])
def test_preferences_move(base: Path, tmp_path: Path, method: str) -> None:
    files = (verdicts if method == "kto" else pairs)(tmp_path)
    rows = [json.loads(line) for line in Path(files).read_text().splitlines()]
    written(Path(files), rows * 3)
    chosen = recipe(base, files, tmp_path / "run", method, data={"held_out": 0.2},
                    train={"steps": 30, "learning_rate": 1e-3})  # fmt: skip
    result = finetune(chosen, quiet=True)
    before, after = result["held_out"]["before"], result["held_out"]["after"]
    assert after["margin"] > before["margin"]
    if method != "kto":  # its baseline moves along: of two verdicts the loss says little
        assert after["loss"] < before["loss"]
    assert result["held_out_examples"] == 2
    assert "Held-out margin" in (tmp_path / "run" / "report.html").read_text()


def test_answers_before_and_after_are_measured(base: Path, tmp_path: Path) -> None:
    files = answers(tmp_path)
    evaluate = {"metric": "exact", "files": [files], "max_new_tokens": 8}
    chosen = recipe(base, files, tmp_path / "run", "lora", evaluate=evaluate,
                    train={"steps": 80, "learning_rate": 5e-3})  # fmt: skip
    task = finetune(chosen, quiet=True)["task"]
    assert task["before"]["accuracy"] == 0
    assert task["after"] == {"accuracy": 1.0, "right": 4, "stopped_by_itself": 1.0}
    assert f"4 questions of {files}, greedy, at most 8 new tokens" in task["protocol"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert [line["after"]["text"] for line in lines] == list(SAID.values())
    assert "pong" in (tmp_path / "run" / "answers.html").read_text()


def test_what_is_refused_writes_over_nothing(base: Path, tmp_path: Path) -> None:
    files = answers(tmp_path)
    evaluate = {"metric": "exact", "files": [files], "max_new_tokens": 4}
    chosen = recipe(base, files, tmp_path / "run", "lora", evaluate=evaluate)
    finetune(chosen, quiet=True)
    kept = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with pytest.raises(InputError, match="already holds a run"):
        finetune(recipe(base, files, tmp_path / "run", "lora", evaluate=evaluate | {"max_new_tokens": 5}), quiet=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == kept


def test_what_is_held_out_is_measured_and_counted(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many rows some are drawn: packing puts the longest first."""
    rows = [{"prompt": "ping", "completion": "pong " * (1 + n % 40)} for n in range(400)]
    chosen = recipe(base, written(tmp_path / "a.jsonl", rows), tmp_path / "run", data={"held_out": 0.5},
                    train={"steps": 1, "sequence_length": 64})  # fmt: skip
    material = read_material(chosen, quiet=True)
    assert material.held is not None
    told = material.counted()
    assert told["held_out_examples"] + told["held_out_left_out_too_long"] == 200
    assert told["held_out_left_out_too_long"] > 0
    held, seen = material.held, list[int]()
    whole = held.batch_of

    def batch_of(items: list[int]) -> Batch:
        seen.extend(items)
        return whole(items)

    monkeypatch.setattr(held, "batch_of", batch_of)
    checker(held, NextToken(), Ranks())(load(base))
    assert len(set(seen)) == 16 < len(held)
    assert max(seen) > len(held) // 2


@pytest.mark.parametrize(("metric", "key"), [("bleu", "bleu"), ("rouge", "rougeL")])
def test_tasks_by_their_metrics(base: Path, tmp_path: Path, metric: str, key: str) -> None:
    chosen = recipe(base, answers(tmp_path), tmp_path / "run", data={"held_out": 0.25}, train={"steps": 2},
                    evaluate={"metric": metric, "max_new_tokens": 4})  # fmt: skip
    task = finetune(chosen, quiet=True)["task"]
    assert task["questions"] == 1
    for when in ("before", "after"):
        assert key in task[when]
        assert 0 <= task[when]["stopped_by_itself"] <= 1


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 1,234.50 dollars.", "1234.5"), ("#### 72", "72"), ("5 - 3 = 2.", "2"), ("-7", "-7"), ("none", None),
     ("10.00", "10"), ("100", "100")],
)  # fmt: skip
def test_last_numbers(text: str, number: str | None) -> None:
    assert last_number(text) == number
    assert same_number(text, f"<<x>> #### {number}") == (number is not None)


def test_a_named_template_goes_into_the_checkpoint(base: Path, tmp_path: Path) -> None:
    (base / "chat_template.jinja").unlink()
    files = answers(tmp_path)
    with pytest.raises(InputError, match="no chat template"):
        finetune(recipe(base, files, tmp_path / "run"), quiet=True)
    with pytest.raises(RecipeError, match=r"needs the control tokens <\|im_start\|>"):
        finetune(recipe(base, files, tmp_path / "run", finetune={"template": "chatml"}), quiet=True)
    finetune(recipe(base, files, tmp_path / "run", "lora", finetune={"template": "alpaca"}), quiet=True)
    assert "### Instruction" in (load_tokenizer(tmp_path / "run").chat_template or "")


def test_what_is_refused(base: Path, tmp_path: Path) -> None:
    files, out = answers(tmp_path), tmp_path / "run"
    for changes, why in (
        ({"method": "dpo"}, "no pair of answers: dpo needs chosen and rejected"),
        ({"method": "kto"}, "no verdict"),
        ({"train": {"sequence_length": 4}}, "the longest needs"),
        ({"train": {"sequence_length": 512, "global_batch_tokens": 512}}, "max_position_embeddings 256"),
        ({"method": "lora", "finetune": {"targets": ["lm_head"]}}, "lm_head"),
        ({"method": "lora", "train": {"optimizer": "muon"}}, "muon"),
        ({"data": {"held_out": 0.01}}, "leaves one side empty"),
        ({"data": {"tokens": "out/tokens"}}, "data.tokens: of a new model"),
        (
            {"model": {"from": str(base), "size": "1m", "rope_theta": 5e5}},
            "model.size and model.rope_theta: of a new model",
        ),
        ({"evaluate": {"metric": "exact"}}, "no questions"),
    ):
        with pytest.raises(InputError, match=why):
            finetune(recipe(base, files, out, **{**changes}), quiet=True)
    with pytest.raises(InputError, match=r"marked as bad: set finetune\.method to kto"):
        finetune(recipe(base, verdicts(tmp_path), out), quiet=True)
    with pytest.raises(InputError, match=r"set finetune.method to dpo"):
        finetune(recipe(base, pairs(tmp_path), out), quiet=True)
    with pytest.raises(RecipeError, match=r"data\.files"):
        finetune(parse({"model": {"from": "x"}}))
    assert not list(out.glob("checkpoints/*"))


def test_a_long_neighbour_costs_no_verdict(base: Path, tmp_path: Path) -> None:
    """The next row's answer, with which KTO compares, is cut to what room there is."""
    rows = [
        {"prompt": f"question {n}", "completion": "word " * size, "label": True} for n, size in enumerate((25, 3, 40))
    ]
    files = written(tmp_path / "verdicts.jsonl", rows)
    found = read_material(recipe(base, files, tmp_path / "run", "kto", train={"sequence_length": 256}), quiet=True)
    assert isinstance(found.source, PackedExamples)
    assert found.source.left_out == 0
    assert all(len(unit) == 2 and all(e.learned() for e in unit) for unit in found.source.units)
    assert all(sum(len(e.ids) - 1 for e in unit) <= 256 for unit in found.source.units)
    assert max(sum(len(e.ids) - 1 for e in unit) for unit in found.source.units) == 256


def test_an_adapter_knows_its_base(base: Path, tmp_path: Path) -> None:
    finetune(recipe(base, answers(tmp_path), tmp_path / "run", "lora"), quiet=True)
    with pytest.raises(InputError, match=r"is an adapter.*camelid merge"):
        finetune(recipe(tmp_path / "run", answers(tmp_path), tmp_path / "more", "lora"), quiet=True)
    torch.manual_seed(9)
    other = Llama(load(base).config)
    tokenizer = load_tokenizer(base)
    shutil.rmtree(base)
    with pytest.raises(InputError, match="is not here: put it back"):
        load(tmp_path / "run")
    save(other, base)
    tokenizer.save(base)
    with pytest.raises(FormatError, match="trained on another base"):
        load(tmp_path / "run")


def test_no_merge_into_rounded_weights(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from camelid.formats import merge

    finetune(recipe(base, answers(tmp_path), tmp_path / "run", "lora", train={"steps": 2}), quiet=True)
    real = merge.open_model
    monkeypatch.setattr(merge, "open_model", lambda source: dataclasses.replace(real(source), quantized="Q4_0"))
    with pytest.raises(InputError, match=r"holds Q4_0 weights.*full precision only"):
        merge_adapter(tmp_path / "run", tmp_path / "merged")
    with pytest.raises(InputError, match="is not an adapter"):
        merge_adapter(base, tmp_path / "merged")


@pytest.mark.parametrize("method", ["lora", "qlora", "dpo"])
def test_a_plan_covers_it(base: Path, tmp_path: Path, method: str) -> None:
    files = (pairs if method == "dpo" else answers)(tmp_path)
    chosen = recipe(base, files, tmp_path / "run", method)
    said = estimate(chosen, planned)
    parts = said["memory_bytes"]
    whole = estimate(recipe(base, answers(tmp_path), tmp_path / "run"), planned, probe=False)["memory_bytes"]
    assert parts["optimizer"] < whole["optimizer"] / 3
    assert parts["checkpoint"] < whole["checkpoint"] / 3
    assert said["fits"]
    assert said["hours"] > 0
    assert not (tmp_path / "run").exists()
    if method == "qlora":
        assert parts["weights"] < whole["weights"]
    shape = planned(chosen, Ranks(), weights=False).model
    assert said["parameters"] == shape.config.num_parameters() == load(base).num_parameters()
    assert said["learned_parameters"] == sum(p.numel() for p in shape.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("how", "rows"), [({"bits": 8, "group": None}, True), ({"bits": 8}, False), ({"bits": 4}, False)]
)
def test_the_output_projection_goes_with_a_base_of_whole_rows(
    base: Path, tmp_path: Path, how: dict[str, Any], rows: bool
) -> None:
    chosen = recipe(base, answers(tmp_path), tmp_path / "run", "qlora", finetune=how)
    for weights in (True, False):
        model = planned(chosen, Ranks(), weights).model
        assert isinstance(model.head, Bytes) == (rows and multiplies(torch.device("cpu")))
        copy = twin(model)
        assert type(copy.head) is type(model.head)
        assert sum(b.nbytes for b in copy.buffers()) == sum(b.nbytes for b in model.buffers())


def test_the_command_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.toml"
    path.write_text(f'[model]\nfrom = "{base}"\n[data]\nfiles = ["{answers(tmp_path)}"]\n[train]\nsteps = 2\n'
                    'sequence_length = 64\nglobal_batch_tokens = 128\nwarmup_steps = 1\n[finetune]\nmethod = "lora"\n'
                    f'[log]\nout = "{tmp_path}/run"\n')  # fmt: skip
    assert cli(["finetune", str(path), "--show-mask", "1"]) == 0
    shown = capsys.readouterr()
    assert "⟦pong⟧⟦<|eot_id|>⟧" in shown.out
    assert "4 prompt and completion" in shown.err
    assert cli(["finetune", str(path)]) == 0
    assert "examples" in capsys.readouterr().err
    assert cli(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["largest_logit_change"] < 1e-5 * told["largest_logit"]
    assert cli(["convert", str(base), "--out", str(tmp_path / "copy"), "--json"]) == 0
    assert torch.equal(load(tmp_path / "copy").lm_head.weight, load(base).lm_head.weight)
    assert cli(["finetune", str(path), "finetune.rnk=3"]) == 2
    assert "did you mean 'rank'" in capsys.readouterr().err
