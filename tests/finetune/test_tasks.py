"""How a task's questions are answered: as the recipe says, the same each time, and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from camelid import Engine, SamplingParams
from camelid.finetune.tasks import Question, Task
from camelid.formats import load
from camelid.kernels.device import best_device
from camelid.recipe import EvaluateSection
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.train.step import compute_dtype

from .conftest import at_random, recipe, written


@pytest.fixture
def base(tokenizers: dict[str, Path], tmp_path: Path) -> tuple[Path, Tokenizer]:
    """A model that writes anything."""
    tokenizer = at_random(tokenizers, tmp_path / "base")
    return tmp_path / "base", tokenizer


def task(out: Path, **settings: Any) -> Task:
    said = ("one", "two words")
    asked = [Question([{"role": "user", "content": word}], None, "x" * len(word)) for word in said]
    return Task(EvaluateSection(metric="exact", max_new_tokens=24, **settings), out, asked, stops=())


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0}, {"repetition_penalty": 1.5}, {"frequency_penalty": 0.7}]
)
def test_answers_are_written_as_the_recipe_says(
    base: tuple[Path, Tokenizer], tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Each question draws by its own number."""
    folder, tokenizer = base
    chosen = task(tmp_path, **settings)
    engine = Engine(load(folder, dtype=compute_dtype(best_device(), "auto"), device=best_device()), tokenizer, ())
    prompts = [tokenizer.apply_chat_template(q.messages) for q in chosen.asked]
    found = engine.generate(prompts, [SamplingParams(24, seed=n, **settings) for n in range(len(prompts))])
    assert [a.text for a in chosen.answers(folder, tokenizer, "", quiet=True)] == [r.text.strip() for r in found]


def test_how_answers_are_written_changes_them_and_is_told(base: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    """Answers of a base that were written another way are not taken for these."""
    folder, tokenizer = base
    told, texts = set(), set()
    ways: list[dict[str, Any]] = [
        {}, {"temperature": 0.5}, {"temperature": 1.0}, {"repetition_penalty": 1.5}, {"frequency_penalty": 9.0}
    ]  # fmt: skip
    for settings in ways:
        chosen = task(tmp_path, **settings)
        assert chosen._before(folder, tokenizer) is None
        chosen.before(folder, tokenizer, quiet=True)
        found = chosen._before(folder, tokenizer)
        assert found is not None
        told.add(chosen._protocol(chosen.score(found)))
        texts.add(tuple(a.text for a in found))
    assert len(told) == len(texts) == len(ways)
    assert any("drawn at temperature 0.5" in line for line in told)
    assert any("greedy, repetition penalty 1.5" in line for line in told)
    assert any("greedy, frequency penalty 9" in line for line in told)


def test_questions_without_room_are_counted_and_told(base: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    folder, tokenizer = base
    rows = [{"prompt": "word " * n, "completion": "yes"} for n in (1, 300, 2, 400, 3)]
    files = written(tmp_path / "asked.jsonl", rows)
    told = {"metric": "exact", "files": [files], "max_new_tokens": 24}
    chosen = recipe(folder, files, tmp_path / "run", evaluate=told)
    found = Task.of(chosen, [], (), tokenizer, 256)
    assert found is not None
    assert (len(found.asked), found.longer) == (3, 2)
    assert "3 questions of " in found._protocol({})
    assert "(2 longer ones left out, which leave no room for an answer)" in found._protocol({})


def test_what_no_answer_can_be_compared_with_is_no_question(
    base: tuple[Path, Tokenizer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tokenizer = base
    rows = [{"prompt": f"{n}?", "completion": said} for n, said in enumerate(["1", "none", "3"])]
    rows += [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "4", "weight": 0}]}]
    rows += [{"prompt": "5?", "completion": ""}]
    files = written(tmp_path / "asked.jsonl", rows)
    told = {"metric": "number", "files": [files], "max_new_tokens": 24}
    found = Task.of(
        recipe(folder, files, tmp_path / "run", evaluate=told, data={"max_bad_share": 0.5}),
        [],
        (),
        tokenizer,
        256,
        False,
    )
    assert found is not None
    assert [q.reference for q in found.asked] == ["1", "3"]
    said = capsys.readouterr().err
    assert "1 bad" in said
    assert "record 5 has an empty answer" in said
