"""The training loop: it learns, resumes bit for bit, accumulates exactly."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from camelid.errors import InputError, RecipeError
from camelid.formats import load
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.recipe import FinetuneSection, Recipe, TrainSection, parse
from camelid.tokenizer.load import from_folder
from camelid.tokens.batch import IGNORE, Batch, PackedTokens, Source
from camelid.tokens.write import build
from camelid.train import pretrain
from camelid.train.optimizer import Muon, optimizer_for, orthogonalized
from camelid.train.parallel import Ranks
from camelid.train.pretrain import token_source
from camelid.train.schedule import learning_rate
from camelid.train.step import check_float8, train_step

from ..conftest import TEXT

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def recipe(tokens: Path, out: Path, **train: Any) -> Recipe:
    settings = {"steps": 8, "sequence_length": 32, "global_batch_tokens": 128, "learning_rate": 3e-3,
                "warmup_steps": 2, "dtype": "float32", "threads": 1} | train  # fmt: skip
    sections = {"data": {"tokens": str(tokens)}, "train": settings, "log": {"out": str(out)}}
    return parse({"model": SHAPE, "checkpoint": {"every": 4, "keep": 9}, **sections})


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_learns(tokens: Path, tmp_path: Path) -> None:
    result = pretrain(recipe(tokens, tmp_path / "run", steps=60, learning_rate=1e-2), quiet=True)
    found = losses(tmp_path / "run")
    assert found[0] > 5.5  # about ln 400: nothing known yet
    assert found[-1] < 3.0
    assert result["steps"] == 60
    assert result["tokens"] == PackedTokens(tokens, 32, 0).batch(0, 60 * 4).supervised()  # padding does not count
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()


def test_a_resumed_run_is_the_run(tokens: Path, tmp_path: Path) -> None:
    whole = pretrain(recipe(tokens, tmp_path / "whole"), quiet=True)
    pretrain(recipe(tokens, tmp_path / "cut"), quiet=True)
    last = tmp_path / "cut" / "checkpoints" / "step-00000008"
    (last / "camelid.json").unlink()  # as if it died while writing the last checkpoint
    first = tmp_path / "cut" / "checkpoints" / "step-00000004"
    assert json.loads((first / "state" / "loop.json").read_text())["position"] == 16
    for path in sorted(last.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    last.rmdir()
    again = pretrain(recipe(tokens, tmp_path / "cut"), resume=True, quiet=True)
    assert again["digest"] == whole["digest"]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_the_seed_decides(tokens: Path, tmp_path: Path) -> None:
    digests = [
        pretrain(recipe(tokens, tmp_path / str(i), seed=seed), quiet=True)["digest"] for i, seed in enumerate((1, 1, 2))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_changed_data_is_known_wherever_the_project_lies(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "p1").mkdir()
    shutil.copytree(tokens, tmp_path / "p1" / "tokens")
    pretrain(recipe(tmp_path / "p1" / "tokens", tmp_path / "p1" / "run"), quiet=True)
    (tmp_path / "p1").rename(tmp_path / "p2")
    moved = recipe(tmp_path / "p2" / "tokens", tmp_path / "p2" / "run").settings()
    moved["data"]["tokens"] = str(tmp_path / "p1" / "tokens")  # as relative paths would leave it
    (tmp_path / "p1").symlink_to(tmp_path / "p2")
    manifest = tmp_path / "p2" / "tokens" / "camelid.json"
    text = manifest.read_text()
    pretrain(parse(moved | {"train": moved["train"]}), resume=True, quiet=True)
    body = text.partition(',\n "seal"')[0].replace('"documents"', '"other": 1,\n "documents"', 1)
    manifest.write_text(body + "\n}")
    with pytest.raises(InputError, match="is not the data that this run began with"):
        pretrain(parse(moved), resume=True, quiet=True)


def test_a_run_is_never_overwritten(tokens: Path, tmp_path: Path) -> None:
    pretrain(recipe(tokens, tmp_path / "run"), quiet=True)
    with pytest.raises(InputError, match="--resume"):
        pretrain(recipe(tokens, tmp_path / "run"), quiet=True)


class Ragged:
    """Rows with very different numbers of supervised tokens."""

    def __len__(self) -> int:
        return 4

    def batch(self, position: int, rows: int) -> Batch:
        ids = torch.arange(4 * 16).view(4, 16) % 300
        labels = (ids + 1) % 300
        for row, kept in enumerate((16, 1, 9, 3)):
            labels[row, kept:] = IGNORE
        chosen = slice(position, position + rows)
        return Batch(ids[chosen], labels[chosen], torch.zeros_like(ids)[chosen], one_document=True)


def gradients(model: Llama, micro: int) -> tuple[float, list[torch.Tensor]]:
    train = {"sequence_length": 16, "global_batch_tokens": 64, "micro_batch_rows": micro, "dtype": "float32",
             "steps": 1, "clip": 1e9}  # fmt: skip
    settings = parse({"train": train}).train
    kept: list[torch.Tensor] = []

    class Keep(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            kept.extend(p.grad.clone() for p in model.parameters() if p.grad is not None)

    found = train_step(model, Keep(model.parameters(), lr=0.0), Ragged().batch(0, 4), settings, 0.0)
    return found.loss, kept


def test_accumulation_is_one_big_batch(model: Llama) -> None:
    loss, whole = gradients(model, 4)
    for micro in (1, 2, 3):
        other, parts = gradients(model, micro)
        assert abs(loss - other) < 1e-6
        for a, b in zip(whole, parts, strict=True):
            assert (a - b).abs().max() < 1e-7


def test_a_bad_loss_stops_before_the_update(model: Llama) -> None:
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    before = model.embed_tokens.weight.clone()
    train = {"sequence_length": 16, "global_batch_tokens": 64, "steps": 1, "dtype": "float32"}
    settings = parse({"train": train}).train
    found = train_step(model, optimizer_for(model, settings), Ragged().batch(0, 4), settings, 1.0)
    assert found.skipped == "the loss is nan, the gradient norm nan"
    assert torch.equal(before, model.embed_tokens.weight)


def test_the_rate_warms_up_and_falls_to_its_floor() -> None:
    settings = TrainSection(learning_rate=1.0, warmup_steps=10, min_learning_rate_share=0.1)
    rates = [learning_rate(step, 200, settings) for step in range(201)]
    assert rates[0] == 0.1
    assert rates[9] == 1.0 == max(rates)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert abs(rates[200] - 0.1) < 1e-9


def test_only_matrices_decay(model: Llama) -> None:
    decayed, kept = optimizer_for(model, TrainSection()).param_groups
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in kept["params"])


def test_transformers_continues_our_checkpoint_alike(tokens: Path, tmp_path: Path) -> None:
    """The tutorial's program on our own pre-trained checkpoint, and transformers on the same folder."""
    transformers = pytest.importorskip("transformers")
    result = pretrain(recipe(tokens, tmp_path / "run", steps=40, learning_rate=1e-2), quiet=True)
    from camelid import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(result["checkpoint"])
    ids = tokenizer.encode("The meaning of life is", return_tensors="pt")
    ours = AutoModelForCausalLM.from_pretrained(result["checkpoint"]).generate(ids, max_length=50)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(result["checkpoint"]).generate(
        ids, attention_mask=torch.ones_like(ids), max_length=50, do_sample=False
    )
    assert ours.tolist() == theirs.tolist()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(result["checkpoint"])
    assert their_tokenizer.encode("The meaning of life is") == ids[0].tolist()
    text = tokenizer.decode(ours[0], skip_special_tokens=True)
    assert text == their_tokenizer.decode(theirs[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"data": {}}, "data.tokens"),
        ({"model": {}}, "which model: set model.size"),
        ({"model": {"hidden_size": 32, "num_hidden_layers": 2}}, "model.intermediate_size, model.num_attention_heads"),
        ({"model": SHAPE | {"from": "models/x"}}, "model.from: this recipe is of a fine-tuning"),
        ({"finetune": {"method": "lora"}}, r"\[finetune\]: this recipe is of a fine-tuning"),
        ({"evaluate": {"metric": "bleu"}}, r"\[evaluate\] beside every: this recipe is of a fine-tuning"),
        ({"model": SHAPE | {"max_position_embeddings": 16}}, "max_position_embeddings"),
        ({"train": {"sequence_length": 32, "global_batch_tokens": 16, "steps": 1}}, "global_batch_tokens"),
    ],
)
def test_recipes_that_cannot_run(tokens: Path, tmp_path: Path, changes: dict[str, Any], names: str) -> None:
    good = recipe(tokens, tmp_path / "run").settings()
    with pytest.raises(InputError, match=names):
        pretrain(parse(good | changes), quiet=True)
    assert not (tmp_path / "run").exists()


def test_float8_is_taken_where_it_helps(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(word: str, **train: Any) -> None:
        with pytest.raises(RecipeError, match=rf"train\.dtype float8 .*{word}.*: set it to auto"):
            pretrain(recipe(tokens, tmp_path / "none", dtype="float8", **train), quiet=True)

    refused("GPU")
    check_float8(recipe(tokens, tmp_path / "none", dtype="float8"), Ranks(), here=False)
    monkeypatch.setattr("camelid.kernels.float8.multiplies", lambda device: True)
    refused("not compiled")
    refused("small", compile=True)
    found = []
    for dtype in ("bfloat16", "float8"):
        monkeypatch.setattr("camelid.model.linear.WORTH", 32)
        monkeypatch.setattr("camelid.train.step.compiled", lambda device, settings: True)
        pretrain(recipe(tokens, tmp_path / dtype, dtype=dtype), quiet=True)
        found.append(losses(tmp_path / dtype))
    assert found[1] != found[0]
    assert found[1] == pytest.approx(found[0], rel=0.02)
    run = recipe(tokens, tmp_path / "none", dtype="float8")
    with pytest.raises(RecipeError, match=r"parallel\.tensor"):
        check_float8(run, Ranks(tensor=2))
    run.finetune = FinetuneSection(method="lora")
    with pytest.raises(RecipeError, match=r"finetune\.method full"):
        check_float8(run, Ranks())


def test_a_loaded_checkpoint_is_the_trained_model(tokens: Path, tmp_path: Path) -> None:
    result = pretrain(recipe(tokens, tmp_path / "run"), quiet=True)
    model = load(tmp_path / "run")
    assert isinstance(model.config, LlamaConfig)
    assert model.num_parameters() == json.loads((Path(result["checkpoint"]) / "camelid.json").read_text())["parameters"]


def test_orthogonalized_keeps_directions_and_evens_singular_values() -> None:
    torch.manual_seed(0)
    for shape in ((24, 64), (64, 24)):
        matrix = torch.randn(shape, dtype=torch.float64)
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        found = u.T @ orthogonalized(matrix) @ vt.T  # diagonal in the matrix's own singular directions
        values = found.diagonal()
        assert (found - values.diag()).abs().max() < 1e-9
        assert values[s > 0.1 * s.max()].min() > 0.6
        assert values.max() < 1.3


def test_muon_moves_the_blocks_matrices_and_adamw_the_rest(tiny: LlamaConfig) -> None:
    """Against AdamW on the same gradients: what Muon does not own ends up bit-equal, what it owns does not."""
    results = {}
    for name in ("adamw", "muon"):
        torch.manual_seed(0)
        model = Llama(tiny)
        optimizer = optimizer_for(model, TrainSection(optimizer=name))  # type: ignore[arg-type]
        assert isinstance(optimizer, Muon) == (name == "muon")
        model(torch.arange(40).view(2, 20)).logits.logsumexp(-1).sum().backward()
        optimizer.step()
        results[name] = {n: p.detach().clone() for n, p in model.named_parameters()}
    differ = {n for n, p in results["adamw"].items() if not torch.equal(p, results["muon"][n])}
    assert differ == {n for n, p in results["adamw"].items() if n.startswith("layers.") and p.dim() == 2}


def test_adamw_is_torchs_to_the_bit(tiny: LlamaConfig) -> None:
    """Its update and its state, also of a weight that a step leaves out."""
    torch.manual_seed(0)
    ours = Llama(tiny)
    theirs = copy.deepcopy(ours)
    settings = TrainSection(learning_rate=0.01, weight_decay=0.2, beta1=0.8, beta2=0.97, eps=1e-6)
    optimizer = optimizer_for(ours, settings)
    pairs = dict(zip(ours.parameters(), theirs.parameters(), strict=True))
    groups = [{"params": [pairs[p] for p in group["params"]], "weight_decay": group["weight_decay"]}
              for group in optimizer.param_groups]  # fmt: skip
    oracle = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.97), eps=1e-6, fused=True)
    for number in range(3):
        for n, (mine, its) in enumerate(pairs.items()):
            if (n + number) % 3:
                mine.grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(9 * number + n))
                its.grad = mine.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        oracle.step()
        oracle.zero_grad()
    for mine, its in pairs.items():
        assert torch.equal(mine, its)
        assert mine.grad is None
        assert optimizer.state[mine].keys() == oracle.state[its].keys()
        assert all(torch.equal(optimizer.state[mine][key], value) for key, value in oracle.state[its].items())


def test_a_run_on_a_cpu_loads_no_compiler(tokens: Path, tmp_path: Path) -> None:
    """80 MiB and a second that nothing needs; the plan's rehearsal, which does, is a copy's."""
    settings = json.dumps(recipe(tokens, tmp_path / "run", steps=2).settings())
    script = (
        "import json, sys; from camelid.recipe import parse; from camelid.train import pretrain\n"
        "print(json.dumps(pretrain(parse(json.loads(sys.argv[1])), quiet=True)['planned']))\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, settings], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    planned = pretrain(recipe(tokens, tmp_path / "here", steps=2), quiet=True)["planned"]["memory_bytes"]
    assert 100 << 20 < json.loads(done.stdout)["memory_bytes"] < planned  # this process is larger


@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
def test_muon_is_torchs(shape: tuple[int, int], tiny: LlamaConfig) -> None:
    """Beside torch's own, whose iteration rounds to bfloat16: momentum, decay, sign and the factor of tall matrices."""
    changed = replace(tiny, hidden_size=shape[1], intermediate_size=shape[0], num_attention_heads=4)
    ours = Llama(changed)
    settings = TrainSection(optimizer="muon", learning_rate=0.02, muon_learning_rate=0.02, weight_decay=0.1)
    optimizer = optimizer_for(ours, settings)
    weight = ours.layers[0].mlp.gate_proj.weight
    assert weight.shape == shape
    theirs = weight.detach().clone().requires_grad_()
    oracle = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="original"
    )
    start = theirs.detach().clone()
    for seed in range(4):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        weight.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        oracle.step()
    assert (weight - theirs).norm() < 0.02 * (theirs - start).norm()


def test_z_loss_reaches_the_loss(model: Llama) -> None:
    batch = Ragged().batch(0, 4)
    train = {"sequence_length": 16, "global_batch_tokens": 64, "dtype": "float32", "steps": 1}
    found = []
    for z_loss in (0.0, 0.1):
        settings = parse({"train": train | {"z_loss": z_loss}}).train
        found.append(train_step(model, optimizer_for(model, settings), batch, settings, 0.0).loss)
    with torch.no_grad():
        sums = model(batch.input_ids).logits[batch.labels != IGNORE].logsumexp(-1)
    assert found[1] - found[0] == pytest.approx(0.1 * float(sums.square().mean()), rel=1e-5)


def test_data_by_weight(tokens: Path, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """Rows of two folders come in the shares that the recipe says; two tokenizers are refused."""
    own = from_folder(tokenizers["byte-level"])
    build(["1234567890 " * 40] * 60, own, tmp_path / "numbers", [])

    def mixed(other: str, weights: list[float]) -> Source:
        folders = [tokens, tmp_path / other]
        named = {"tokens": [str(folder) for folder in folders], "weights": weights}
        return token_source(parse({"data": named, "train": {"sequence_length": 32}}), folders)

    source = mixed("numbers", [1.0, 3.0])
    digits = set(own.encode("1234567890", add_special_tokens=False))
    rows = source.batch(0, 200).input_ids
    shares = [float(torch.isin(row, torch.tensor(sorted(digits))).float().mean()) for row in rows]
    assert 0.7 <= sum(share > 0.5 for share in shares) / 200 <= 0.8
    build(TEXT, from_folder(tokenizers["sentencepiece"]), tmp_path / "other", [])
    with pytest.raises(InputError, match="made with different tokenizers"):
        mixed("other", [])


def cpu() -> str:
    """What decides the last bit of a product: the kind of processor and the registers that torch uses."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    named = [
        next((v.strip() for k, v in facts.items() if k.strip() == n), "") for n in ("vendor_id", "cpu family", "model")
    ]
    return " ".join([*named, torch.backends.cpu.get_cpu_capability()])


def test_a_hundred_losses_are_those_of_the_file(tokens: Path, tmp_path: Path) -> None:
    """Exactly, on a kind of processor that the file knows; on another one to 1e-3. A change of the arithmetic, of the
    data's order or of the initialisation moves them: then look why, and only then write the file anew."""
    pretrain(recipe(tokens, tmp_path / "run", steps=100, schedule="wsd"), quiet=True)
    found = losses(tmp_path / "run")
    known = json.loads((Path(__file__).parent / "losses.json").read_text())
    if cpu() in known:
        assert found == known[cpu()]
    else:
        assert max(abs(a - b) for a, b in zip(found, next(iter(known.values())), strict=True)) < 1e-3
