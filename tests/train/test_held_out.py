"""What a pre-training sets aside: never learned from, measured along the way, and the measuring changes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from camelid.errors import InputError, RecipeError
from camelid.formats.load import load
from camelid.recipe import Recipe, parse
from camelid.recipe import load as load_recipe
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.batch import PackedTokens
from camelid.tokens.write import TOKENS, build
from camelid.train import pretrain
from camelid.train.checkpoint import LoopState
from camelid.train.log import Log
from camelid.train.parallel import Ranks
from camelid.train.pretrain import pretraining
from camelid.train.step import Taken

from .test_train import recipe


def holding(folder: Path, out: Path, every: int | None = 3, steps: int = 8, **data: Any) -> Recipe:
    settings = recipe(folder, out, steps=steps).settings()
    settings["data"] |= {"held_out": 0.2} | data
    return parse(settings | ({"evaluate": {"every": every}} if every else {}))


def measured(run: Path) -> dict[int, dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["held_out"] for record in records if "held_out" in record}


@torch.no_grad()
def loss_on(source: PackedTokens, checkpoint: str) -> float:
    """By the document, without packing."""
    model, losses = load(checkpoint), []
    batch = source.rows(source.held)
    for ids, labels, documents in zip(batch.input_ids, batch.labels, batch.document_ids, strict=True):
        for document in range(int(documents.max()) + 1):
            own = documents == document
            logits = model(ids[own][None]).logits[0]
            losses.append(cross_entropy(logits, labels[own], reduction="none"))
    return float(torch.cat(losses).double().mean())


def test_the_loss_of_held_out_rows(tokens: Path, tmp_path: Path) -> None:
    result = pretrain(holding(tokens, tmp_path / "run"), quiet=True)
    found = measured(tmp_path / "run")
    assert list(found) == [0, 3, 6, 8]
    source = PackedTokens(tokens, 32, 0, 0.2)
    assert found[8]["loss"] == pytest.approx(loss_on(source, result["checkpoint"]), rel=1e-5)
    assert result["held_out"] == {"before": found[0], "after": found[8]}
    assert found[8]["loss"] < found[0]["loss"]
    assert "held-out loss" in (tmp_path / "run" / "report.html").read_text()


def test_what_is_told_while_it_runs(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    step = Log.step

    def listened(self: Log, *args: Any) -> str:
        told.append(step(self, *args))
        return told[-1]

    monkeypatch.setattr(Log, "step", listened)
    pretrain(holding(tokens, tmp_path / "run"))
    found = measured(tmp_path / "run")
    last = [0, 0, 0, 3, 3, 3, 6, 6]  # before each step
    assert [f"(held-out {found[at]['loss']:.3f})" in line for at, line in zip(last, told, strict=True)] == [True] * 8
    assert "the data is read" not in capsys.readouterr().err
    steps = 5 * len(PackedTokens(tokens, 32, 0, 0.2)) // 4 + 1  # of four rows
    pretrain(holding(tokens, tmp_path / "long", steps=steps))
    assert re.search(r"the data is read 5\.\d times: more of it would teach more", capsys.readouterr().err)


def test_it_is_not_learned_from(tokens: Path, tmp_path: Path) -> None:
    """Other tokens in what is held out: the same weights, another loss."""
    first = pretrain(holding(tokens, tmp_path / "a"), quiet=True)
    source = PackedTokens(tokens, 32, 0, 0.2)
    pieces, data = source.packing, np.memmap(tokens / TOKENS, dtype=source.index["dtype"], mode="r+")
    for row in source.held:
        for piece in range(int(pieces.rows[row]), int(pieces.rows[row + 1])):
            begin, size = int(pieces.firsts[piece]), int(pieces.sizes[piece])
            data[begin + 1 : begin + size] = 7  # a piece's ends may be another's beginning or last label
    data.flush()
    second = pretrain(holding(tokens, tmp_path / "b"), quiet=True)
    assert first["digest"] == second["digest"]
    assert first["held_out"]["after"] != second["held_out"]["after"]


def test_measuring_changes_nothing(tokens: Path, tmp_path: Path) -> None:
    often = pretrain(holding(tokens, tmp_path / "often", every=1), quiet=True)
    seldom = pretrain(holding(tokens, tmp_path / "seldom", every=None), quiet=True)
    assert list(measured(tmp_path / "seldom")) == [0, 8]
    assert often["digest"] == seldom["digest"]
    assert often["held_out"] == seldom["held_out"]
    whole = pretrain(recipe(tokens, tmp_path / "whole"), quiet=True)
    assert whole["digest"] != often["digest"]


def test_several_folders(tokens: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    build(["1234567890 " * 40] * 60, tokenizer, tmp_path / "numbers", [])
    folders = [str(tokens), str(tmp_path / "numbers")]
    result = pretrain(holding(tokens, tmp_path / "run", tokens=folders, weights=[1.0, 3.0]), quiet=True)
    after = result["held_out"]["after"]
    losses = [after[f"loss on {folder}"] for folder in folders]
    assert losses[1] < losses[0]
    assert after["loss"] == pytest.approx(0.25 * losses[0] + 0.75 * losses[1], rel=1e-12)


def test_what_cannot_be_held_out(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.held_out 0\.999 of the \d+ rows of 32 .* none to learn from"):
        pretrain(holding(tokens, tmp_path / "run", held_out=0.999), quiet=True)
    with pytest.raises(RecipeError, match=r"evaluate\.every measures what data\.held_out sets aside"):
        holding(tokens, tmp_path / "run", held_out=0.0)
    assert not (tmp_path / "run").exists()


def test_a_killed_run_is_measured_as_if_it_had_not_been(tokens: Path, tmp_path: Path) -> None:
    whole = pretrain(holding(tokens, tmp_path / "whole"), quiet=True)
    pretrain(holding(tokens, tmp_path / "cut"), quiet=True)
    last = tmp_path / "cut" / "checkpoints" / "step-00000008"
    (last / "camelid.json").unlink()  # as if it died while writing the last checkpoint
    again = pretrain(holding(tokens, tmp_path / "cut"), resume=True, quiet=True)
    assert again["digest"] == whole["digest"]
    assert again["held_out"] == whole["held_out"]
    assert measured(tmp_path / "cut") == measured(tmp_path / "whole")
    with pytest.raises(InputError, match=r"data\.held_out was 0\.2 and is now 0\.3"):
        pretrain(holding(tokens, tmp_path / "cut", held_out=0.3), resume=True, quiet=True)


def test_at_most_so_many_tokens_are_held(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(PackedTokens(tokens, 32, 0, 0.2).held) > 3
    monkeypatch.setattr("camelid.tokens.batch.HELD_OUT_TOKENS", 100)
    assert len(PackedTokens(tokens, 32, 0, 0.2).held) == 3


def test_a_return_to_a_checkpoint_tells_what_was_measured_there(tokens: Path, tmp_path: Path) -> None:
    job = pretraining(holding(tokens, tmp_path / "run"), [tokens], Ranks(), quiet=True)
    taken = Taken(1.0, 1.0, 1, 1, None, job.source.batch(0, 1))
    (tmp_path / "run").mkdir()
    with Log(tmp_path / "run", job.recipe, job.model, Ranks(), LoopState(steps=8)) as log:
        for step, loss in ((0, 3.0), (3, 2.0)):
            log.checked(LoopState(step=step), {"loss": loss}, 0.0)
        assert "(held-out 2.000)" in log.step(LoopState(step=4), taken, 0.0, {})
        log.rolled_back(LoopState(step=2))
        assert "(held-out 3.000)" in log.step(LoopState(step=3), taken, 0.0, {})


def test_what_a_recipe_sets_aside_can_be_left_out() -> None:
    assert load_recipe("small").evaluate.every == 100
    assert load_recipe("small", ["data.held_out=0.0"]).evaluate.every is None
    with pytest.raises(RecipeError, match=r"evaluate\.every measures what"):
        load_recipe("small", ["data.held_out=0.0", "evaluate.every=5"])
