"""Kill it anywhere: the newest finished checkpoint is whole, and the run goes on to the same bits."""

from __future__ import annotations

import errno
import fcntl
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from camelid.artifact import MANIFEST, damage, read_manifest
from camelid.disk import sha256_file
from camelid.errors import CamelidError, InputError
from camelid.formats.load import finished
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.recipe import TrainSection
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.write import build
from camelid.train import checkpoint, pretrain
from camelid.train.loop import run
from camelid.train.optimizer import optimizer_for
from camelid.train.parallel import Ranks
from camelid.train.pretrain import pretraining

from ..conftest import TEXT
from .conftest import Trained
from .shim import FAULTS, Died, Disk
from .test_train import losses, recipe


def third_save(trained: Trained, run: Path, at: int, fault: str) -> tuple[Disk, str]:
    """Two checkpoints are there; the third is saved on a disk that fails. Returns the disk and how it ended."""
    shutil.copytree(trained.run, run)
    trained = replace(trained, run=run)
    with pytest.MonkeyPatch.context() as patch:
        disk, end = Disk(patch, run, at, fault), "saved"
        try:
            trained.save(3)
        except Died:
            end = "died"
        except CamelidError as error:
            end = str(error)
    return disk, end


@pytest.mark.parametrize("fault", FAULTS)
def test_every_file_operation_of_a_save_may_fail(
    small: LlamaConfig, tokenizer: Tokenizer, tmp_path: Path, fault: str
) -> None:
    """At each: no finished checkpoint is lost, and the newest one is whole."""
    model = Llama(small)
    trained = Trained(model, optimizer_for(model, TrainSection()), tokenizer, tmp_path / "before")
    trained.save(1)
    trained.save(2)
    whole, _ = third_save(trained, tmp_path / "whole", -1, fault)
    names = [name for name, _ in whole.done]
    assert len(names) > 30
    assert set(names) >= {"open", "write", "fsync", "rename", "replace", "unlink", "rmdir"}
    for at in range(1, len(names) + 1):
        run = tmp_path / f"{at}"
        disk, end = third_save(trained, run, at, fault)
        if fault == "power":
            disk.cut_the_power()
        newest = checkpoint.newest_good(run)
        assert newest is not None
        assert [wrong for p in finished(run) if (wrong := damage(p))] == []  # nothing half-made passes for finished
        steps = {int(p.name[5:]) for p in finished(run)}
        assert steps >= {1, 2} or steps >= {2, 3}, (at, names[at - 1], end)
        if fault in ("die", "half", "power"):
            assert end == "died", whole.done[at - 1]
        elif end != "saved":
            assert "is intact" in end or "removed" in end
        checkpoint.sweep(run)
        if at % 5:  # every fifth goes on
            continue
        checkpoint.restore(newest, trained.model, trained.optimizer)
        replace(trained, run=run).save(4)
        assert checkpoint.newest_good(run) == checkpoint.folder_of(run, 4)
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [p.name for p in finished(run)][::-1]


def run_of(tokens: Path, out: Path) -> list[str]:
    """The command of a run of 12 steps, saving every second one."""
    settings = ("model.hidden_size=32 model.intermediate_size=64 model.num_hidden_layers=2 model.num_attention_heads=4 "
                "train.steps=12 train.sequence_length=32 train.global_batch_tokens=128 train.warmup_steps=2 "
                "train.threads=1 train.dtype=float32 train.learning_rate=3e-3 checkpoint.every=2")  # fmt: skip
    (out.parent / "empty.toml").touch()
    places = [f"data.tokens={tokens}", f"log.out={out}"]
    return [
        sys.executable,
        "-m",
        "camelid",
        "pretrain",
        str(out.parent / "empty.toml"),
        *settings.split(),
        *places,
        "--json",
    ]


def killed(tokens: Path, cut: Path, dice: random.Random) -> tuple[int, dict[str, Any]]:
    """A run whose process is killed up to four times, each time a little later, until it gets through: how often, and
    what came of it."""
    kills = 0
    for _ in range(10):
        resume = ["--resume"] if finished(cut) else []
        process = subprocess.Popen([*run_of(tokens, cut), *resume], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() - begun < 60:
            last = finished(cut)
            if kills < 4 and last and int(last[0].name[5:]) > 2 * kills:  # a moment after something was saved
                time.sleep(dice.random() * 0.03)
                process.kill()
                kills += 1
                break
            time.sleep(0.002)
        stdout, _ = process.communicate()
        if process.returncode == 0:
            break
    return kills, json.loads(stdout)


@pytest.mark.nightly
def test_two_hundred_kills(tokens: Path, tmp_path: Path) -> None:
    """No finished checkpoint is lost, and every run comes to the same bits."""
    whole, dice, done = tmp_path / "whole", random.Random(2), 0
    wanted = json.loads(subprocess.run(run_of(tokens, whole), capture_output=True, check=True).stdout)
    while done < 200:
        cut = tmp_path / "cut"
        shutil.rmtree(cut, ignore_errors=True)
        kills, result = killed(tokens, cut, dice)
        assert result["digest"] == wanted["digest"]
        assert losses(cut) == losses(whole)
        assert [path for path in finished(cut) if damage(path)] == []
        done += kills
        print(f"{done} kills")


def test_killed_at_random_moments_it_resumes_to_the_same_bits(tokens: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    wanted = json.loads(subprocess.run(run_of(tokens, whole), capture_output=True, check=True).stdout)
    kills, result = killed(tokens, cut, random.Random(1))
    assert kills >= 3
    assert result["digest"] == wanted["digest"]
    assert losses(cut) == losses(whole)
    rows = [
        [json.loads(line)["rows"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (cut, whole)
    ]
    assert rows[0] == rows[1]
    states = [finished(run)[0] / "state" for run in (cut, whole)]
    for name in ("optimizer.safetensors", "random.safetensors", "loop.json"):
        assert (states[0] / name).read_bytes() == (states[1] / name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_within_a_step(tokens: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [*run_of(tokens, tmp_path / "run"), "train.steps=4000", "checkpoint.every=4000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 5) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (0 if number == signal.SIGTERM else 130), err
    [saved] = finished(tmp_path / "run")
    assert damage(saved) is None
    assert int(saved.name[5:]) == metrics.read_text().count("\n")
    if number == signal.SIGTERM:
        assert json.loads(out)["stopped_by"] == "SIGTERM"
    assert "--resume" in err


def test_every_flipped_byte_is_noticed(small: LlamaConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Llama(small)
    trained = Trained(model, optimizer_for(model, TrainSection()), tokenizer, tmp_path)
    trained.save(1)
    trained.save(2)
    first, second = checkpoint.folder_of(tmp_path, 1), checkpoint.folder_of(tmp_path, 2)
    files = sorted(p for p in second.rglob("*") if p.is_file())
    dice = random.Random(0)
    for _ in range(200):
        path = dice.choice(files)
        content = bytearray(path.read_bytes())
        place = dice.randrange(len(content))
        content[place] ^= 1 << dice.randrange(8)
        before = path.read_bytes()
        path.write_bytes(content)
        assert checkpoint.newest_good(tmp_path) == first, (path, place)
        path.write_bytes(before)
    assert checkpoint.newest_good(tmp_path) == second
    files[0].write_bytes(files[0].read_bytes()[:-1])
    assert checkpoint.newest_good(tmp_path) == first


@pytest.mark.parametrize(("setting", "named"), [("clip", "train.clip"), ("seed", "train.seed")])
def test_another_recipe_does_not_resume(tokens: Path, tmp_path: Path, setting: str, named: str) -> None:
    pretrain(recipe(tokens, tmp_path / "run"), quiet=True)
    with pytest.raises(InputError, match=rf"{named} was .* and is now"):
        pretrain(recipe(tokens, tmp_path / "run", **{setting: 5}), resume=True, quiet=True)


def test_another_learning_rate_resumes_and_is_told(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(recipe(tokens, tmp_path / "run"), quiet=True)
    pretrain(recipe(tokens, tmp_path / "run", learning_rate=1e-4, dtype="bfloat16"), resume=True, quiet=True)
    told = capsys.readouterr().err
    assert "train.learning_rate was 0.003 and is 0.0001 from here on" in told
    assert "train.dtype was 'float32' and is 'bfloat16' from here on" in told


def test_inputs_that_have_gone_stop_no_save(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest says what was read, not what lies there at a save."""
    job = pretraining(recipe(tokens, tmp_path / "run"), [tokens], Ranks(), quiet=True)
    begun, real = sha256_file(tokens / MANIFEST), job.source.batch

    def gone(*args: Any) -> Any:
        (tokens / MANIFEST).unlink(missing_ok=True)
        return real(*args)

    monkeypatch.setattr(job.source, "batch", gone)
    made = Path(run(job)["checkpoint"])
    assert not (tokens / MANIFEST).exists()
    assert read_manifest(made)["inputs"][0]["sha256"] == begun


def test_other_data_does_not_resume(tokens: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pretrain(recipe(tokens, tmp_path / "run"), quiet=True)
    build(TEXT[:-1], tokenizer, tokens, [])
    with pytest.raises(InputError, match="is not the data"):
        pretrain(recipe(tokens, tmp_path / "run"), resume=True, quiet=True)


def test_a_full_disk_is_seen_before_the_run(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(InputError, match=r"10 checkpoint.* do not fit"):
        pretrain(recipe(tokens, tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_two_runs_do_not_share_a_folder(tokens: Path, tmp_path: Path) -> None:
    process = subprocess.Popen([*run_of(tokens, tmp_path / "run"), "train.steps=4000"], stdout=subprocess.DEVNULL)
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        with pytest.raises(InputError, match="another process"):
            pretrain(recipe(tokens, tmp_path / "run"), resume=True, quiet=True)
    finally:
        process.kill()
        process.wait()


def test_fresh_good_checkpoints_outlive_damaged_newer_ones(
    small: LlamaConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = Llama(small)
    trained = Trained(model, optimizer_for(model, TrainSection()), tokenizer, tmp_path)
    for step in (50, 60):
        trained.save(step)
        (checkpoint.folder_of(tmp_path, step) / "config.json").write_text("{}")
    for step in (1, 2, 3):
        trained.save(step)
    assert checkpoint.newest_good(tmp_path) == checkpoint.folder_of(tmp_path, 3)
    assert checkpoint.folder_of(tmp_path, 2).exists()
    assert not checkpoint.folder_of(tmp_path, 1).exists()


def test_a_file_system_without_locks(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told, and the run goes on; a lock that another process holds ends it."""

    def refused(error: OSError) -> Callable[..., None]:
        def flock(*_: Any) -> None:
            raise error

        return flock

    monkeypatch.setattr(fcntl, "flock", refused(OSError(errno.ENOLCK, "No locks available")))
    assert pretrain(recipe(tokens, tmp_path / "run"), quiet=True)["steps"] == 8
    assert "cannot be locked (No locks available)" in capsys.readouterr().err
    monkeypatch.setattr(fcntl, "flock", refused(BlockingIOError(errno.EAGAIN, "busy")))
    with pytest.raises(InputError, match="another process is training into it"):
        pretrain(recipe(tokens, tmp_path / "other"), quiet=True)
