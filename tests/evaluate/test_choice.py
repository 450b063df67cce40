"""Choices read side by side score as each read alone; templates and files at fault are named."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from camelid.cli import run as cli
from camelid.errors import InputError
from camelid.evaluate.choice import choice, encode, log_likelihoods, questions, read_task
from camelid.formats import save
from camelid.model.llama import Llama
from camelid.tokenizer.tokenizer import Tokenizer


def row(question: str, *choices: str, key: str = "A") -> dict[str, Any]:
    return {"question": question, "choices": {"text": list(choices), "label": list("ABCDE"[: len(choices)])},
            "answerKey": key}  # fmt: skip


ROWS = [
    row("What is life?", "to learn", "a number", "白天热"),
    row("And then?", "teach what one has learned", "no", key="B"),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(r) for r in ROWS * 9) + "\n")
    return tmp_path / "q.jsonl"


def alone(model: Llama, prompt: list[int], answer: list[int]) -> float:
    with torch.inference_mode():
        scores = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    return sum(float(scores[len(prompt) - 1 + n, token]) for n, token in enumerate(answer))


@pytest.mark.parametrize("task", ["arc", "commonsense_qa"])
def test_side_by_side_is_alone(scorer: Llama, tokenizer: Tokenizer, file: Path, task: str) -> None:
    asked = questions(file, read_task(task))
    encoded = [encode(q, tokenizer) for q in asked[:4]]
    for e, found in zip(encoded, log_likelihoods(scorer, encoded), strict=True):
        for answer, score in zip(e.answers, found, strict=True):
            assert score == pytest.approx(alone(scorer, e.prompt, answer), abs=1e-4)
    for q, e in zip(asked, encoded, strict=False):
        assert tokenizer.decode([*e.prompt, *e.answers[0]], skip_special_tokens=True) == q.prompt + q.answers[0]


def test_accuracies_and_shots(scorer: Llama, tokenizer: Tokenizer, file: Path) -> None:
    asked = questions(file, read_task("arc"))
    found = choice(scorer, tokenizer, asked[:6], shots=asked[6:8])
    again = [a["picked"] == a["right"] for a in found["answers"]]
    assert found["accuracy"] == sum(again) / 6
    even = [[x / len(c.strip()) for x, c in zip(a["log_likelihoods"], q.answers, strict=True)]
            for a, q in zip(found["answers"], asked, strict=False)]  # fmt: skip
    normal = [max(range(len(e)), key=e.__getitem__) == q.right for e, q in zip(even, asked, strict=False)]
    assert found["accuracy_normalized"] == sum(normal) / 6
    assert "2 shots" in found["protocol"]
    with pytest.raises(InputError, match="fewer --shots"):
        choice(scorer, tokenizer, asked[:1], shots=asked * 2)


def test_lengths_are_counted_in_characters(
    scorer: Llama, tokenizer: Tokenizer, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers are "to learn", "a number", "白天热": eight, eight and three characters, as lm-eval counts them."""
    monkeypatch.setattr(
        import_module("camelid.evaluate.choice"), "log_likelihoods", lambda model, asked: [[-8.0, -9.0, -3.5]]
    )
    found = choice(scorer, tokenizer, questions(file, read_task("arc"))[:1])
    assert (found["answers"][0]["picked"], found["answers"][0]["picked_normalized"]) == (2, 0)


def test_the_command_line(scorer: Llama, tokenizer: Tokenizer, file: Path, tmp_path: Path,
                          capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    save(scorer, tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    assert cli(["evaluate", "choice", str(tmp_path / "m"), "--data", str(file), "--limit", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for wrong in (["--shots", "18"], ["--shots", "-1"], ["--limit", "0"]):
        assert cli(["evaluate", "choice", str(tmp_path / "m"), "--data", str(file), *wrong]) == 2
        assert wrong[0] in capsys.readouterr().err
    assert found["questions"] == 5
    assert {"accuracy", "accuracy_normalized", "protocol"} <= found.keys()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"question": "a", "choices": {"text": ["b"], "label": ["A"]}}', "answerKey"),
        ('{"question": "a", "choices": {"text": ["b"], "label": ["A"]}, "answerKey": "E"}', "'E' is not in list"),
        ('{"question": "a", "answerKey": "A"}', "choices"),
        ("{", "line 1"),
        ("", "no question"),
        ('{"question": "a", "choices": {"text": "ab", "label": "AB"}, "answerKey": "A"}', "must be lists"),
    ],
)
def test_questions_at_fault(tmp_path: Path, line: str, why: str) -> None:
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(InputError, match=why):
        questions(tmp_path / "q.jsonl", read_task("arc"))


def test_templates_at_fault(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="known are arc, commonsense_qa"):
        read_task("hellaswag")
    (tmp_path / "t.toml").write_text('prompt = "x"\n')
    with pytest.raises(InputError, match="lacks the field 'answer'"):
        read_task(str(tmp_path / "t.toml"))


def test_smollm2_on_arc(smollm2: Path, data: Path) -> None:
    """Real questions: equal to transformers, choice by choice."""
    transformers = pytest.importorskip("transformers")
    from camelid.formats.load import load, load_tokenizer

    model, tokenizer = load(smollm2), load_tokenizer(smollm2)
    asked = questions(data / "eval/mc/arc_challenge_train.jsonl", read_task("arc"))[:3]
    encoded = [encode(q, tokenizer) for q in asked]
    found = log_likelihoods(model, encoded)
    config = transformers.LlamaConfig(**{k: v for k, v in model.config.to_dict().items() if k != "rope_scaling"})
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    state = {f"model.{n}" if not n.startswith("lm_head") else n: p for n, p in model.state_dict().items()}
    theirs.load_state_dict(state, assign=True, strict=False)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    for e, scores in zip(encoded, found, strict=True):
        for answer, score in zip(e.answers, scores, strict=True):
            with torch.inference_mode():
                logits = theirs(torch.tensor([[*e.prompt, *answer]])).logits[0].log_softmax(-1)
            expected = sum(float(logits[len(e.prompt) - 1 + n, t]) for n, t in enumerate(answer))
            assert score == pytest.approx(expected, rel=1e-5)
