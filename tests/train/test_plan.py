"""What is said before a run is what the run finds."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from camelid.errors import InputError, RecipeError
from camelid.formats.load import load_tokenizer
from camelid.kernels.cross_entropy import CHUNK_BYTES, linear_cross_entropy, linear_log_probs
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.lora import LoraConfig, adapt
from camelid.recipe import TrainSection, parse
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.train import pretrain
from camelid.train.budget import choose, seconds, shape, wished
from camelid.train.estimate import estimate
from camelid.train.log import flops_per_token
from camelid.train.optimizer import moment_bytes
from camelid.train.parallel import Ranks
from camelid.train.plan import gaps_share, held, memory, steps_wanted
from camelid.train.pretrain import planned
from camelid.train.rehearse import Live, step_memory

from .test_train import recipe

CPU = torch.device("cpu")


def test_a_rehearsal_counts_what_a_step_allocates() -> None:
    """The same count over a real step, with and without activation checkpointing."""
    config = LlamaConfig.named("1m", vocab_size=500)
    settings = TrainSection(dtype="float32", sequence_length=64)
    sizes = []
    for checkpointing in (False, True):
        model = Llama(config)
        model.activation_checkpointing = checkpointing
        ids = torch.zeros(4, 64, dtype=torch.int64)
        with Live(model.parameters()) as live:
            states = model.hidden(ids).flatten(0, 1)
            linear_cross_entropy(states, model.lm_head.weight, ids.flatten()).backward()  # type: ignore[no-untyped-call]
        sizes.append(step_memory(model, 4, 1, settings, CPU))
        assert abs(sizes[-1] / live.peak - 1) < 0.03
    assert sizes[1] < sizes[0]


def test_what_a_rank_holds_between_steps() -> None:
    """Of four, two of which share every row: a quarter of the layers' matrices, half of the embedding and the norms."""
    model = Llama(LlamaConfig.named("1m", vocab_size=500))
    matrices = sum(p.numel() for layer in model.layers for p in layer.parameters() if p.dim() == 2)
    rest = sum(p.numel() for p in model.parameters()) - matrices
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert held(sizes, Ranks(0, 4, tensor=2)) == matrices // 4 + rest // 2
    assert held(sizes, Ranks(0, 4)) == matrices // 4 + rest // 4
    muon = moment_bytes(model, TrainSection(optimizer="muon"))
    assert held(muon, Ranks(0, 4, tensor=2)) == 4 * matrices // 4 + 8 * rest // 2


def test_gaps_are_widest_amid_gradients_in_float32(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = {}
    for own, joined in itertools.product((False, True), (False, True)):
        monkeypatch.setattr("camelid.train.plan.takes", lambda *_, own=own: own)
        monkeypatch.setattr("camelid.train.plan.none_kept", lambda joined=joined: joined)
        for dtype in ("float32", "bfloat16"):
            job = planned(recipe(tokens, tmp_path / "run", dtype=dtype), Ranks(), False)
            shares[dtype, own, joined] = [gaps_share(job, count, Ranks()) for count in (1, 2)]
    assert shares["float32", False, False] == shares["float32", True, False] == [0.45, 0.7]
    assert shares["bfloat16", True, False] == [0.28, 0.7]
    assert shares["bfloat16", False, False] == [0.28, 0.36]
    assert shares["float32", True, True] == [0.22, 0.62]
    assert shares["bfloat16", True, True] == [0.14, 0.25]


def test_the_copy_that_a_checkpoint_is_written_from(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(**checkpoint: object) -> tuple[int, int]:
        settings = recipe(tokens, tmp_path / "run").settings()
        parts = memory(planned(parse(settings | {"checkpoint": checkpoint}), Ranks(), False))
        return parts["copy"], parts["checkpoint"]

    copy, whole = copied(every=4)
    assert copy == whole // 2 > 0
    for none in ({}, {"every": 8}, {"every": 4, "background": False}):  # nothing is written beside a step
        assert copied(**none)[0] == 0
    monkeypatch.setattr("camelid.train.plan.WRITTEN_AT_ONCE", whole - 1)
    assert copied(every=4)[0] == whole


def test_what_was_there_before_is_not_counted() -> None:
    """A product by a weight makes its output only, though it takes the weight's transpose."""
    weight, x = torch.zeros(1000, 100), torch.zeros(3, 100)
    with Live([weight]) as live:
        out = torch.nn.functional.linear(x, weight)
    assert live.peak == out.nbytes


@pytest.mark.parametrize("adapted", [False, True])
def test_a_step_does_not_hold_the_weights_again(adapted: bool) -> None:
    """Where products are in the weights' own dtype: gradients of what is learned, and what a token makes."""
    config = LlamaConfig.named("1m", vocab_size=500, num_hidden_layers=8, hidden_size=256, intermediate_size=1024)
    model = Llama(config)
    if adapted:
        adapt(model, LoraConfig(r=1))
    size = 4 * config.num_parameters()
    step = step_memory(model, 1, 1, TrainSection(dtype="float32", sequence_length=2), CPU)
    assert step < 0.3 * size if adapted else size < step < 1.3 * size


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_log_probs])
def test_chunks_of_logits_take_turns(function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk's at a time: the next is written where the last one was."""
    states, weight = torch.randn(64, 2, requires_grad=True), torch.randn(1000, 2, requires_grad=True)
    chunk = 16 * 1000 * 4
    monkeypatch.setitem(CHUNK_BYTES, "cpu", chunk)
    with Live() as live:
        function(states, weight, torch.arange(64)).sum().backward()
    assert chunk < live.peak < 1.7 * chunk  # beside it the weight's gradient, small here


def test_a_large_model_is_rehearsed_without_its_memory() -> None:
    config = LlamaConfig.named("7b", num_hidden_layers=2)
    with torch.device("meta"):
        model = Llama(config)
    whole = step_memory(model, 1, 1, TrainSection(dtype="bfloat16"), CPU)
    assert whole > 4 * config.num_parameters()  # its gradients alone
    adapt(model, LoraConfig())
    assert step_memory(model, 1, 1, TrainSection(dtype="bfloat16"), CPU) < whole / 2


def test_an_estimate_and_the_run(tokens: Path, tmp_path: Path) -> None:
    chosen = recipe(tokens, tmp_path / "run", steps=6)
    said = estimate(chosen, planned, price=3.0)
    result = pretrain(chosen, quiet=True)
    assert json.loads((Path(result["checkpoint"]) / "camelid.json").read_text())["parameters"] == said["parameters"]
    assert said["memory_bytes"]["peak"] == sum(
        size for name, size in said["memory_bytes"].items() if name not in ("peak", "checkpoint")
    )
    assert said["steps"] == 6
    assert said["cost"] == pytest.approx(3.0 * said["hours"])
    weights = next((tmp_path / "run" / "checkpoints").glob("*/model.safetensors"))
    moments = weights.parent / "state" / "optimizer.safetensors"
    written = weights.stat().st_size + moments.stat().st_size
    assert said["memory_bytes"]["checkpoint"] == pytest.approx(written, rel=0.05)


def test_what_does_not_fit_is_refused_or_checkpointed(tokens: Path, tmp_path: Path) -> None:
    chosen = recipe(tokens, tmp_path / "run", sequence_length=64, global_batch_tokens=64 * 256)
    whole = estimate(chosen, planned, probe=False)["memory_bytes"]
    tight = recipe(tokens, tmp_path / "run", sequence_length=64, global_batch_tokens=64 * 256,
                   memory_gib=(whole["peak"] - 50 * 2**20) / 2**30)  # fmt: skip
    assert "activation checkpointing" in estimate(tight, planned, probe=False)["said"]
    hopeless = recipe(tokens, tmp_path / "run", memory_gib=0.01)
    with pytest.raises(RecipeError, match=r"the run needs .* GiB and may use 0\.0 GiB"):
        pretrain(hopeless, quiet=True)
    assert not (tmp_path / "run").exists()


def test_budget_and_depth(tokens: Path, tokenizer: Tokenizer) -> None:
    assert [seconds(t) for t in ("2h", "45m", "1h30m", "90s")] == [7200, 2700, 5400, 90]
    for wrong in ("", "soon", "2 hours", "h"):
        with pytest.raises(InputError, match="--budget"):
            seconds(wrong)
    base = parse({"data": {"tokens": str(tokens)}, "train": {"sequence_length": 64}})
    deep = choose(base, None, 3, quiet=True)
    config = LlamaConfig(vocab_size=len(tokenizer), **shape(3))
    assert deep.model.num_hidden_layers == 3
    assert deep.train.steps is not None
    assert deep.train.steps * deep.train.global_batch_tokens == pytest.approx(20 * config.num_parameters(), rel=0.05)
    short, long = (choose(base, t, None, quiet=True) for t in ("1m", "5h"))
    assert (short.train.minutes, long.train.minutes) == (1, 300)
    assert (short.model.num_hidden_layers or 0) < (long.model.num_hidden_layers or 0)
    with pytest.raises(InputError, match="--budget"):
        choose(base, "", None, quiet=True)


def test_a_wish_leaves_what_it_does_not_choose(tokens: Path, tmp_path: Path) -> None:
    own = {"max_position_embeddings": 4096, "rope_theta": 500000.0, "tie_word_embeddings": False}
    raw = {"model": {"size": "1m", **own}, "data": {"tokens": str(tokens)}, "train": {"sequence_length": 64},
           "log": {"out": str(tmp_path / "run")}}  # fmt: skip
    found = choose(parse(raw), None, 1, quiet=True)
    assert found.model.model_dump(include=set(own)) == own
    assert found.model.hidden_size == 64
    vocab = len(load_tokenizer(tokens / "tokenizer"))
    untied = LlamaConfig(vocab_size=vocab, **(shape(1) | own)).num_parameters()
    assert found.train.steps * found.train.global_batch_tokens == pytest.approx(20 * untied, rel=0.05)
    short = parse(found.settings() | {"train": found.settings()["train"] | {"steps": 2, "dtype": "float32"}})
    pretrain(short, quiet=True)
    with pytest.raises(RecipeError, match=r"model.from: this recipe is of a fine-tuning"):
        choose(parse(raw | {"model": {"from": "models/x"}}), None, 1, quiet=True)
    file = tmp_path / "wish.toml"
    sections = (
        "\n".join([f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in keys.items())]) for name, keys in raw.items()
    )
    file.write_text("\n".join(sections))
    again = wished(file, ["train.micro_batch_rows=1"], None, 1, resume=True)
    assert (again.train.micro_batch_rows, again.train.steps) == (1, 2)
    assert again.model == short.model
    assert wished(file, ["train.sequence_length=32"], None, 1, resume=True).train.sequence_length == 32
    cured = wished(file, ["train.learning_rate=1e-9", "train.muon_learning_rate=1e-4"], None, 1, resume=True).train
    assert (cured.learning_rate, cured.muon_learning_rate) == (1e-9, 1e-4)
    assert wished(file, ["train.muon_learning_rate=1e-4"], None, 1, quiet=True).train.muon_learning_rate == 1e-4


def test_an_epoch_is_all_of_the_data() -> None:
    each = ((1, 11, 8, 2), (1, 16, 8, 2), (0.5, 20, 8, 2), (3, 3, 9, 1), (0.29, 100, 29, 1), (1, 20, 8, 3))
    for epochs, sequences, rows, steps in each:
        settings = TrainSection(epochs=epochs, sequence_length=8)
        assert steps_wanted(settings, sequences, rows, None) == steps
        assert epochs * sequences <= steps * rows + 1e-9
    with pytest.raises(RecipeError, match=r"2.5 sequences of the data's 5, and one step reads 8: lower"):
        steps_wanted(TrainSection(epochs=0.5, sequence_length=8), 5, 8, None)


def test_flops_are_those_of_the_products() -> None:
    """6 for each weight of a matrix; attention by hand for one layer."""
    config = LlamaConfig(vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    matrices = 16 * 16 * 2 + 2 * 16 * 8 + 3 * 16 * 32 + 100 * 16
    norms = 3 * 16
    assert flops_per_token(config, 64) == 6 * (matrices + norms) + 6 * 64 * 16


def test_ranks_share_what_is_spread(tokens: Path, tmp_path: Path) -> None:
    from camelid.train import plan
    from camelid.train.pretrain import pretraining

    job = pretraining(recipe(tokens, tmp_path / "run"), [tokens], Ranks(), quiet=True)
    one, four = plan.memory(job), plan.memory(job, Ranks(world=4))
    assert four["weights"] == one["weights"] // 4
    assert four["optimizer"] == one["optimizer"] // 4
    assert json.dumps(four)


def test_a_machines_memory_is_shared_by_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several machines' eight, two are on this one."""
    from camelid.train import plan

    monkeypatch.setattr(plan, "free_here", lambda ranks: ranks)
    assert plan.available(Ranks(world=8)) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert plan.available(Ranks(world=8)) == 2
