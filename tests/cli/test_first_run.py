"""The first minutes: `camelid` alone, `camelid doctor`, completion and the manual page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from camelid import doctor, here
from camelid.cli import VERBS, completion, run
from camelid.kernels import library, threads


def alone(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(folder)
    assert run([]) == 0
    return capsys.readouterr().out


def test_alone_it_tells_what_is_here_and_what_comes_next(
    life: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "In this folder" not in alone(tmp_path, capsys, monkeypatch)
    wanted = ["tokenizer train corpus", "tokens build corpus --tokenizer tokenizer", "pretrain", "generate pretrain"]
    for name, following in zip(("corpus", "tokenizer", "tokens", "pretrain"), wanted, strict=True):
        shutil.copytree(life / name, tmp_path / name)
        told = alone(tmp_path, capsys, monkeypatch)
        assert f"Next: camelid {following}" in told
    (tmp_path / "tokens" / "camelid.json").write_text("{}")  # what is damaged is not shown
    (tmp_path / ".x.1-00000000.making").mkdir()
    shutil.copy(tmp_path / "corpus" / "camelid.json", tmp_path / ".x.1-00000000.making")  # nor what is being made
    told = here.told().partition("Next")[0]
    assert "tokens " not in told
    assert ".making" not in told
    for name in ("corpus", "tokenizer", "tokens"):
        shutil.rmtree(tmp_path / name)
    (tmp_path / "pretrain").rename(tmp_path / "model")
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "model").rename(tmp_path / "quickstart" / "tuned")
    assert "Next: camelid generate quickstart/tuned" in here.told()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert here.told() == ""


def examined(**variables: str) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "camelid", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=True)
    return {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}


def test_doctor_names_what_is_slow_and_its_fix() -> None:
    found = examined(CAMELID_NATIVE="0", OMP_NUM_THREADS="1", PYTHONIOENCODING="latin-1")
    assert (found["native library"]["status"], found["native library"]["fix"]) == ("slow", "unset CAMELID_NATIVE")
    assert found["terminal"]["fix"] == "export PYTHONUTF8=1"
    if len(os.sched_getaffinity(0)) > 1:
        assert (found["threads"]["status"], found["threads"]["fix"]) == ("slow", "unset OMP_NUM_THREADS")
    healthy = examined()
    assert "terminal" not in healthy
    assert not any(name.startswith("extra") for name in healthy)  # the tests' environment has them all


def test_doctor_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "library", lambda: None)
    monkeypatch.setattr(library, "PATH", tmp_path / "nothing.so")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    [finding] = doctor._native()
    assert "no C++ compiler" in finding.detail
    assert finding.fix.startswith("install g++")


def test_doctor_in_a_container_and_without_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "quota", lambda: 0.5)
    [finding] = doctor._threads()
    assert finding.fix == "export OMP_NUM_THREADS=1"
    assert set(doctor._packages("serve")) == {"starlette", "uvicorn", "h11", "prometheus-client"}
    monkeypatch.setattr(doctor, "_installed", lambda name: name != "sacrebleu")
    [finding] = doctor._extras()
    assert (finding.name, finding.fix) == ("extra evaluate", "pip install 'camelid[evaluate]'")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ev", {"evaluate"}),
        ("evaluate per", {"perplexity"}),
        ("evaluate perplexity --wi", {"--window"}),
        ("serve --por", {"--port"}),
        ("pretrain --res", {"--resume"}),
        ("", set(VERBS)),
    ],
)
def test_bash_completes(typed: str, offered: set[str]) -> None:
    words = ["camelid", *typed.split(" ")]
    script = f"{completion.bash()}\nCOMP_WORDS=({' '.join(words)} '')\nCOMP_CWORD={len(words) - 1}\n_camelid\n"
    done = subprocess.run(
        ["bash", "-c", f'{script}printf "%s\\n" "${{COMPREPLY[@]}}"'], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == offered
    assert done.stderr == ""


def test_every_verb_is_in_fish_and_in_the_manual() -> None:
    lines = completion.fish().splitlines()
    assert all(re.fullmatch(r"complete -c camelid( (-\w+ )?('(\\'|[^'])*'|[\w-]+))*", line) for line in lines)
    for verb in VERBS:
        assert any(f"-a {verb} " in line for line in lines)
        assert f".SS {verb}" in completion.manual()
    assert "\\-\\-vocab\\-size" in completion.manual()
