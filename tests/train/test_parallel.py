"""More processes change the speed, not the result: FSDP2, tensor parallel and both, against one process, float64."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from camelid.errors import RecipeError
from camelid.recipe import parse
from camelid.train.parallel import Ranks, shard
from camelid.train.step import rows_per_step

from .test_crashes import run_of

ONCE = ("train.steps=1", "checkpoint.every=50", "data.held_out=0.2")
SCRIPT = Path(__file__).parent / "rank.py"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start(command: list[str], world: int) -> list[subprocess.Popen[str]]:
    """The command once for each rank, as torchrun would."""
    port = free_port()
    found = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
        root = str(Path(__file__).parent.parent.parent)
        environment = os.environ | place | {"PYTHONPATH": root}
        found.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    return found


def trained(
    out: Path,
    world: int,
    tensor: int = 1,
    context: int = 1,
    steps: int = 4,
    kind: str = "adamw",
    base: Path | None = None,
) -> Path:
    told = [str(n) for n in (tensor, context, steps)]
    command = [sys.executable, str(SCRIPT), str(out), *told, kind, *([str(base)] if base else [])]
    ranks = start(command, world)
    for rank in ranks:
        _, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err
    return out


def difference(a: Path, b: Path, name: str) -> float:
    left, right = load_file(a / name), load_file(b / name)
    assert left.keys() == right.keys()
    return max(float((left[k].double() - right[k].double()).abs().max()) for k in left)


class Alone(dict[str, Path]):
    """What one process makes, by optimizer, trained when first asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, kind: str) -> Path:
        self[kind] = trained(self.root / kind, 1, kind=kind)
        return self[kind]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    root = tmp_path_factory.mktemp("alone")
    return Alone(root)


SLOW = pytest.mark.nightly


def test_ranks_that_share_matrices_multiply_in_bfloat16(alone: Alone, tmp_path: Path) -> None:
    """What one of them adds to the residual stream is not there yet when it is given."""
    found = trained(tmp_path / "out", 2, tensor=2, kind="bfloat16")
    ours, theirs = (json.loads((run / "losses.json").read_text()) for run in (alone["bfloat16"], found))
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=5e-3)
    assert theirs["norms"] == pytest.approx(ours["norms"], rel=0.05)


@pytest.mark.parametrize(
    ("world", "tensor", "context", "kind"),
    [
        (2, 1, 1, "adamw"),
        (4, 2, 1, "adamw"),
        (4, 1, 2, "adamw"),
        (2, 1, 2, "muon"),
        pytest.param(4, 2, 2, "muon", marks=SLOW),
        pytest.param(2, 2, 1, "adamw", marks=SLOW),
        pytest.param(2, 1, 1, "muon", marks=SLOW),
        pytest.param(4, 2, 1, "muon", marks=SLOW),
    ],
)
def test_the_ranks_together_are_one_process(
    alone: Alone, tmp_path: Path, world: int, tensor: int, context: int, kind: str
) -> None:
    many = trained(tmp_path / "many", world, tensor, context, kind=kind)
    ours, one = (json.loads((f / "losses.json").read_text()) for f in (many, alone[kind]))
    assert abs(ours["losses"][0] - one["losses"][0]) <= 1e-12
    assert abs(ours["norms"][0] - one["norms"][0]) <= 1e-12
    assert difference(many, alone[kind], "gradients.safetensors") <= 1e-12
    assert max(abs(a - b) for a, b in zip(ours["losses"], one["losses"], strict=True)) <= 1e-10
    assert difference(many, alone[kind], "weights.safetensors") <= 1e-8


@pytest.mark.parametrize("kind", ["adamw", pytest.param("muon", marks=SLOW)])
def test_resharding_keeps_every_bit(tmp_path: Path, kind: str) -> None:
    """2 -> 1 -> 4 (2 x 2) -> 2 ranks, no step in between: weights and moments are bitwise what they were."""
    first = last = trained(tmp_path / "first", 2, steps=2, kind=kind)
    for number, (world, tensor) in enumerate(((1, 1), (4, 2), (2, 1))):
        last = trained(tmp_path / str(number), world, tensor, 1, 0, kind, last / "step-00000001")
    assert difference(first, last, "weights.safetensors") == 0
    assert difference(first, last, "moments.safetensors") == 0


def test_two_ranks_end_a_run_that_saves_once_and_begin_as_one_does(tokens: Path, tmp_path: Path) -> None:
    """No checkpoint but the last: every rank ends well, with the weights' beginning and the rows of one process, and
    measures as it does."""
    command = [*run_of(tokens, tmp_path / "two"), *ONCE]
    ranks = start(command, 2)
    for rank in ranks:
        _, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err
    alone = [*run_of(tokens, tmp_path / "one"), *ONCE]
    subprocess.run(alone, check=True, capture_output=True)
    logs = ((tmp_path / f / "metrics.jsonl").read_text().splitlines() for f in ("two", "one"))
    ours, theirs = ([json.loads(line) for line in log] for log in logs)
    assert [sorted(record) for record in ours] == [sorted(record) for record in theirs]
    assert ours[1]["rows"] == theirs[1]["rows"]
    assert ours[1]["tokens"] == theirs[1]["tokens"]
    assert abs(ours[1]["loss"] - theirs[1]["loss"]) < 1e-5
    for mine, other in zip((ours[0], ours[2]), (theirs[0], theirs[2]), strict=True):
        assert mine["held_out"]["loss"] == pytest.approx(other["held_out"]["loss"], abs=1e-5)
    weights = [next((tmp_path / f / "checkpoints").iterdir()) for f in ("two", "one")]
    assert difference(*weights, "model.safetensors") < 1e-4


def test_batches_and_heads_that_do_not_divide() -> None:
    settings = parse({"train": {"sequence_length": 16, "global_batch_tokens": 48}}).train
    with pytest.raises(RecipeError, match=r"2 data ranks cannot share evenly: set it to 64"):
        rows_per_step(settings, 2)
    assert rows_per_step(settings, 3) == 3
    from camelid.model.config import LlamaConfig
    from camelid.model.llama import Llama

    with torch.device("meta"):
        model = Llama(LlamaConfig(hidden_size=30, num_attention_heads=3, intermediate_size=32, num_hidden_layers=1))
    with pytest.raises(RecipeError, match="num_attention_heads 3"):
        shard(model, Ranks(0, 2, 2, mesh=object()))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"parallel.tensor 1 times parallel.context 2 .* num_attention_heads 3"):
        shard(model, Ranks(0, 2, 1, 2, mesh=object()))  # type: ignore[arg-type]
    uneven = {"train": {"sequence_length": 17}, "parallel": {"context": 2}}
    with pytest.raises(RecipeError, match=r"recipe: parallel.context 2 .*train.sequence_length 17: try 16"):
        parse(uneven)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lost_rank_ends_all_and_a_signal_to_one_saves_on_all(
    tokens: Path,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    out = tmp_path / "run"
    ranks = start([*run_of(tokens, out), "train.steps=4000", "checkpoint.every=5"], 2)
    try:
        while not list(out.glob("checkpoints/step-*")) and all(r.poll() is None for r in ranks):
            time.sleep(0.02)
        assert all(r.poll() is None for r in ranks), [r.communicate()[1] for r in ranks]
        ranks[1].send_signal(number)
        out0, err0 = ranks[0].communicate(timeout=75)
        ranks[1].communicate(timeout=75)
    finally:
        for rank in ranks:
            rank.kill()
    if number == signal.SIGTERM:
        assert [r.returncode for r in ranks] == [0, 0], err0
        assert json.loads(out0)["stopped_by"] == "SIGTERM"
    else:
        assert ranks[0].returncode == 1, err0
        assert "rank 0 of 2, step" in err0
        assert "--resume" in err0
