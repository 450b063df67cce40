"""What a checkpoint promises besides being whole (test_crashes.py): room that is counted, errors that are told, a state
that is put back and nothing else."""

from __future__ import annotations

import errno
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from camelid.errors import CamelidError, FormatError, InputError
from camelid.formats.load import finished
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.recipe import TrainSection
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.train import checkpoint
from camelid.train.optimizer import optimizer_for

from .conftest import Trained

MIB = 1 << 20


@pytest.fixture
def trained(small: LlamaConfig, tokenizer: Tokenizer, tmp_path: Path) -> Trained:
    model = Llama(small)
    return Trained(model, optimizer_for(model, TrainSection()), tokenizer, tmp_path / "run")


def test_room_is_that_of_all_kept_and_one_in_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=7 * MIB))
    run = tmp_path / "not" / "yet" / "there"
    checkpoint.preflight(run, 7 * MIB // 3, keep=2)
    with pytest.raises(InputError, match=r"3 checkpoint.* of 3 MiB do not fit into the 7 MiB"):
        checkpoint.preflight(run, 3 * MIB, keep=2)
    (run / "checkpoints" / "step-1" / "state").mkdir(parents=True)
    (run / "checkpoints" / "step-1" / "state" / "moments").write_bytes(bytes(2 * MIB))  # will make room in its turn
    checkpoint.preflight(run, 3 * MIB, keep=2)
    with pytest.raises(InputError, match=r"into the 9 MiB that are free: make room"):
        checkpoint.preflight(run, 3 * MIB + 1, keep=2)


def test_what_is_passed_over_is_told(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    trained.save(1)
    trained.save(2)
    assert checkpoint.newest_good(trained.run) == checkpoint.folder_of(trained.run, 2)
    assert capsys.readouterr().err == ""
    (checkpoint.folder_of(trained.run, 2) / "config.json").write_text("{}")
    assert checkpoint.newest_good(trained.run) == checkpoint.folder_of(trained.run, 1)
    told = capsys.readouterr().err
    assert "step-00000002 is passed over" in told
    assert "config.json" in told
    assert "step-00000001" not in told


@pytest.mark.parametrize(("number", "tries"), [(errno.ENOSPC, 2), (errno.EIO, 1)])
def test_only_a_full_disk_is_swept_and_written_to_again(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, number: int, tries: int
) -> None:
    trained.save(1)
    left = trained.run / "checkpoints" / ".step-00000002.1.making"
    left.mkdir()
    tried, write = [], checkpoint.write

    def failing(out: Path, *more: Any, **parts: Any) -> None:
        tried.append(left.exists())
        if len(tried) == 1:
            raise OSError(number, "no")
        write(out, *more, **parts)

    monkeypatch.setattr(checkpoint, "write", failing)
    if tries == 2:
        trained.save(2)
        assert tried == [True, False]
        assert checkpoint.newest_good(trained.run) == checkpoint.folder_of(trained.run, 2)
    else:
        with pytest.raises(
            CamelidError, match=r"step-00000002 could not be written: no.*step-00000001, is intact.*--resume"
        ):
            trained.save(2)
        assert tried == [True]


def test_what_does_not_read_back_removes_nothing(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that keeps other bytes than it was given, without a word."""
    trained.save(1)
    trained.save(2)
    write = checkpoint.write_safetensors

    def flipped(path: Path, tensors: Any) -> Any:
        digest = write(path, tensors)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return digest

    monkeypatch.setattr(checkpoint, "write_safetensors", flipped)
    with pytest.raises(CamelidError, match=r"does not read back: .*Is the disk failing"):
        trained.save(3)
    monkeypatch.undo()
    kept = [checkpoint.folder_of(trained.run, step) for step in (2, 1)]
    assert [folder for folder in finished(trained.run) if folder in kept] == kept
    assert checkpoint.newest_good(trained.run) == kept[0]


def test_an_error_without_a_checkpoint_says_so(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: Any, **parts: Any) -> None:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(checkpoint, "write", failing)
    with pytest.raises(CamelidError, match="No checkpoint exists yet"):
        trained.save(1)


def test_an_old_one_that_cannot_be_removed_is_told_and_no_more(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(folder: Path) -> None:
        raise OSError(errno.EACCES, "not yours")

    trained.save(1, keep=1)
    monkeypatch.setattr(checkpoint, "remove", failing)
    trained.save(2, keep=1)
    assert checkpoint.newest_good(trained.run) == checkpoint.folder_of(trained.run, 2)
    told = capsys.readouterr().err
    assert "step-00000001 could not be removed: not yours" in told
    assert "step-00000002" not in told


def test_a_state_is_put_back_and_nothing_else_stays(trained: Trained) -> None:
    trained.save(0)
    weights = {name: value.clone() for name, value in trained.model.state_dict().items()}
    moments = [{k: v.clone() for k, v in trained.optimizer.state[p].items()} for p in trained.model.parameters()]
    drawn = torch.rand(3)
    for parameter in trained.model.parameters():
        trained.optimizer.state[parameter]["of another time"] = torch.zeros(1)
    trained.save(1)
    state = checkpoint.restore(checkpoint.folder_of(trained.run, 0), trained.model, trained.optimizer)
    assert state.step == 0
    assert all(torch.equal(value, weights[name]) for name, value in trained.model.state_dict().items())
    for parameter, before in zip(trained.model.parameters(), moments, strict=True):
        after = trained.optimizer.state[parameter]
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(torch.rand(3), drawn)


def test_the_state_of_another_model_is_refused(trained: Trained, small: LlamaConfig) -> None:
    trained.save(1)
    wider = Llama(replace(small, intermediate_size=16))
    with pytest.raises(FormatError, match=r"mlp.*does not fit the recipe's model"):
        checkpoint.restore(checkpoint.folder_of(trained.run, 1), wider, optimizer_for(wider, TrainSection()))


def test_what_others_keep_beside_checkpoints_stays(trained: Trained) -> None:
    """A download, a converted file, a copy of the best one: none is swept, counted, gone on from or pruned."""
    for step in (1, 2):
        trained.save(step)
    place = trained.run / "checkpoints"
    shutil.copytree(place / "step-00000002", place / "step-00000002-best")
    for name in ("EleutherAI/pythia", "epoch-3", "gguf"):
        (place / name).mkdir(parents=True)
        (place / name / "weights").write_text("dear")
    for name in ("step-00000007", ".step-00000008.1-0123abcd.making"):
        (place / name).mkdir()
    checkpoint.sweep(trained.run)
    assert {p.name for p in place.iterdir()} == {
        "step-00000001", "step-00000002", "step-00000002-best", "EleutherAI", "epoch-3", "gguf"
    }  # fmt: skip
    assert [p.name for p in finished(trained.run)] == ["step-00000002", "step-00000001"]
    assert checkpoint.newest_good(trained.run) == place / "step-00000002"
