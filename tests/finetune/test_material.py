"""What a recipe's files come to: what is learned of them, what KTO compares with, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from camelid.errors import InputError, RecipeError
from camelid.finetune.job import planned
from camelid.finetune.material import Material, read_material
from camelid.finetune.pack import PackedExamples
from camelid.finetune.read import read_file
from camelid.finetune.records import BadRow, record
from camelid.formats import save
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.recipe import parse
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.train.parallel import Ranks

from .conftest import at_random, recipe, written


@pytest.fixture
def base(tokenizers: dict[str, Path], tmp_path: Path) -> tuple[Path, Tokenizer]:
    return tmp_path / "base", at_random(tokenizers, tmp_path / "base")


def material(base: Path, rows: list[Any], out: Path, method: str = "full", **more: Any) -> Material:
    return read_material(recipe(base, written(out / "rows.jsonl", rows), out / "run", method, **more))


def learned(found: Material) -> list[list[str]]:
    """The words that are learned, of each example of each unit."""
    assert isinstance(found.source, PackedExamples)
    return [[found.tokenizer.decode([i for i in e.labels if i >= 0], skip_special_tokens=True) for e in unit]
            for unit in found.source.units]  # fmt: skip


def test_a_turn_of_weight_0_is_not_learned(base: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    """As OpenAI's format says."""
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "bad", "weight": 0},
        {"role": "user", "content": "two"}, {"role": "assistant", "content": "good", "weight": 1},
    ]  # fmt: skip
    assert learned(material(base[0], [{"messages": turns}] * 2, tmp_path)) == [["good"]] * 2
    with pytest.raises(InputError, match="each has the weight 0"):
        material(base[0], [{"messages": turns[:2]}], tmp_path)
    with pytest.raises(BadRow, match=r"weight 0\.5"):
        record({"messages": [turns[0], turns[1] | {"weight": 0.5}]})


def test_every_answer_of_a_preference_that_differs_is_learned(base: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    """Of answers that part early, not the last turn alone."""
    begin = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "shared"},
             {"role": "user", "content": "two"}]  # fmt: skip
    ways = [
        [*begin, {"role": "assistant", "content": word}, {"role": "user", "content": "three"},
         {"role": "assistant", "content": "alike"}]
        for word in ("good", "bad")
    ]  # fmt: skip
    found = learned(
        material(
            base[0], [{"chosen": ways[0], "rejected": ways[1]}] * 2, tmp_path, "dpo", train={"sequence_length": 256}
        )
    )
    assert [[text.replace(" ", "") for text in unit] for unit in found] == [["goodalike", "badalike"]] * 2


def test_a_template_is_given_what_it_may_ask_for() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    found = record({"messages": [
        {"role": "user", "content": "time?", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "look"},
        {"role": "tool", "content": "noon", "tool_call_id": "c1"},
        {"role": "assistant", "content": "noon"},
    ]})  # fmt: skip
    asked, called, told, _ = found.messages
    assert (asked["name"], called["reasoning_content"], told["tool_call_id"]) == ("ann", "look", "c1")
    assert called["tool_calls"][0]["id"] == "c1"


def test_kto_compares_with_an_answer_to_another_question(base: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    """Also where both verdicts on a question stand side by side."""
    rows = [{"prompt": q, "completion": f"{word} {q}", "label": word == "yes"}
            for q in ("one", "two", "three") for word in ("yes", "no")]  # fmt: skip
    for own, beside in learned(material(base[0], rows, tmp_path, "kto")):
        assert own.split()[-1] != beside.split()[-1]


def test_kto_keeps_a_verdict_whose_question_does_not_fit_twice(base: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    most = 150 // len(base[1].encode("why why", add_special_tokens=False)) * 2  # words of 150 tokens
    rows = [{"prompt": "why " * n, "completion": f"because {n}", "label": True} for n in (3, most, 4)]
    found = material(base[0], rows, tmp_path, "kto", train={"sequence_length": 256})
    assert isinstance(found.source, PackedExamples)
    sizes = [[len(e.ids) for e in unit] for unit in found.source.units]
    long = max(sizes)
    assert 2 * (long[0] - 10) > 256  # its own question would not fit again
    assert found.source.left_out == 0
    assert len(sizes) == 3
    assert all(unit[1].learned() for unit in found.source.units)


def test_a_tokenizer_of_another_model_is_told(base: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    folder, tokenizer = base
    config = LlamaConfig(vocab_size=len(tokenizer) - 1, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=256)  # fmt: skip
    save(Llama(config), folder)
    tokenizer.save(folder)
    rows = written(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    with pytest.raises(InputError, match=f"{len(tokenizer)} tokens but the embedding only {len(tokenizer) - 1}"):
        planned(recipe(folder, rows, tmp_path / "run"), Ranks(), weights=False)


def test_half_a_surrogate_pair_in_a_call_is_a_bad_row(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": '{"q": "\\ud83d"}'}}
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    written(tmp_path / "rows.jsonl", [row])
    used, found = read_file(tmp_path / "rows.jsonl", lambda each: each)
    assert not used
    assert "half of a surrogate pair" in found.bad[0][1]


def test_a_fault_of_the_template_names_the_record(tmp_path: Path) -> None:
    written(tmp_path / "rows.jsonl", [{"prompt": str(n), "completion": "b"} for n in range(5)])

    def use(found: Any) -> Any:
        if found.messages[0]["content"] == "3":
            raise InputError("the chat template fails")

    with pytest.raises(InputError, match=r"rows\.jsonl, record 4: the chat template fails"):
        read_file(tmp_path / "rows.jsonl", use)


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"finetune": {"method": "lora", "adapter": "none"}}, "contradicts method lora"),
        ({"finetune": {"method": "dora", "adapter": "qlora"}}, "contradicts method dora"),
        ({"data": {"files": ["a.jsonl"], "weights": [1.0]}}, "data.weights"),
        ({"evaluate": {"every": 5}}, "data.held_out"),
        ({"evaluate": {"files": ["q.jsonl"]}}, "evaluate.metric"),
    ],
)
def test_what_would_do_nothing_is_refused(tmp_path: Path, sections: dict[str, Any], why: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(RecipeError, match=why):
        read_material(
            parse({"model": {"from": str(tmp_path)}, "data": {"files": [str(tmp_path / "a.jsonl")]}} | sections)
        )


def test_the_end_of_an_answer_is_found_behind_any_number_of_texts(base: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    rows: list[Any] = [{"text": f"a text of number {n}"} for n in range(150)] + [
        {"prompt": "ping", "completion": "pong"}
    ]
    found = material(base[0], rows, tmp_path)
    ends = {found.tokenizer.token(i) for i in found.stops}
    assert "<|eot_id|>" in ends


def test_what_is_asked_on_both_sides_is_told(
    base: tuple[Path, Tokenizer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"ping {n % 5}", "completion": f"pong {n}"} for n in range(20)] + [{"text": "only text"}] * 20
    chosen = recipe(base[0], written(tmp_path / "a.jsonl", rows), tmp_path / "run", data={"held_out": 0.5})
    read_material(chosen, quiet=False)
    assert re.search(r"\d+ of the 20 records held out ask what others", capsys.readouterr().err)
    alone = [{"prompt": f"ping {n}", "completion": "pong"} for n in range(20)]
    read_material(
        recipe(base[0], written(tmp_path / "b.jsonl", alone), tmp_path / "run", data={"held_out": 0.5}), False
    )
    assert "held out ask" not in capsys.readouterr().err
