"""Several processes learn what one learns."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from camelid.errors import RecipeError
from camelid.finetune.job import tuning
from camelid.finetune.material import read_material
from camelid.train.parallel import Ranks

from ..train.test_parallel import start
from .conftest import answers, pairs, recipe, verdicts

NIGHTLY = ("lora", "qlora", "kto", "full", "full-context", "dora-context", "qlora-context")


@pytest.mark.parametrize(
    "method",
    [
        "dpo-full",
        "lora-context",
        *(pytest.param(m, marks=pytest.mark.nightly) for m in NIGHTLY),
    ],
)
def test_two_ranks_are_one(base: Path, tmp_path: Path, method: str) -> None:
    """The same weights from two processes as from one, to what another order of sums makes of float32; and resumed."""
    method, _, way = method.partition("-")
    full = way == "full"
    files = {"dpo": pairs, "kto": verdicts}.get(method, answers)(tmp_path)
    name = "model" if full or method == "full" else "adapter_model"
    rows = Path(files).read_text()
    Path(files).write_text("\n".join([rows] * 3))
    settings = {"model.from": base, "train.steps": 3, "train.sequence_length": 64, "train.global_batch_tokens": 256,
                "train.warmup_steps": 1, "train.dtype": "float32", "data.held_out": 0.2, "evaluate.every": 2,
                "checkpoint.every": 2, "finetune.method": method,
                "finetune.adapter": "none" if full else "auto"}  # fmt: skip
    settings |= {} if name == "model" else {"finetune.rank": 4}
    settings |= {"finetune.group": 16} if method == "qlora" else {}
    common = [f'data.files=["{files}"]', *(f"{key}={value}" for key, value in settings.items())]
    (tmp_path / "r.toml").write_text("")
    for world in (1, 2):
        context = world if way == "context" else 1
        command = [sys.executable, "-m", "camelid", "finetune", str(tmp_path / "r.toml"), *common,
                   f"log.out={tmp_path}/w{world}", f"parallel.context={context}", "--json"]  # fmt: skip
        for rank in start(command, world):
            _, err = rank.communicate(timeout=120)
            assert rank.returncode == 0, err
    last = [tmp_path / f"w{n}/checkpoints/step-00000003" for n in (1, 2)]
    one, two = (load_file(folder / f"{name}.safetensors") for folder in last)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-5)
    shutil.rmtree(last[1])
    for rank in start([*command, "--resume"], 2):
        _, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err
    again = load_file(last[1] / f"{name}.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in two.items())
    logs = [[json.loads(line) for line in (tmp_path / f"w{n}/metrics.jsonl").read_text().splitlines()] for n in (1, 2)]
    assert [r.get("rows") for r in logs[0]] == [r.get("rows") for r in logs[1]]
    for a, b in zip(*logs, strict=True):
        assert a.get("tokens") == b.get("tokens")
        assert a.get("held_out", {}).get("loss", 0) == pytest.approx(b.get("held_out", {}).get("loss", 0), abs=1e-5)


def test_answers_that_are_compared_are_not_split(base: Path, tmp_path: Path) -> None:
    chosen = recipe(base, pairs(tmp_path), tmp_path / "run", "dpo", parallel={"context": 2})
    with pytest.raises(RecipeError, match=r"parallel.context splits rows, and dpo compares whole answers"):
        tuning(chosen, read_material(chosen), Ranks(0, 2, 1, 2))
