"""What a CUDA device computes, against the CPU's float64 and float32: run by hand with `pytest -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from camelid.formats import save
from camelid.generate import draft as drafts
from camelid.generate.cache import Kept
from camelid.generate.engine import Engine, Result
from camelid.generate.runner import TorchRunner
from camelid.generate.sampling import SamplingParams
from camelid.kernels.attention import Documents, Stretches, attention, packed
from camelid.kernels.cross_entropy import linear_cross_entropy
from camelid.kernels.elementwise import rms_norm, swiglu
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.lora import LoraConfig, adapt
from camelid.model.quantized import BITS, keep_inputs, quantize_head, quantize_layers, round_to_nearest
from camelid.model.rope import Rotation, rotate
from camelid.recipe import parse
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.batch import Batch
from camelid.tokens.write import build
from camelid.train import pretrain
from camelid.train.optimizer import optimizer_for
from camelid.train.step import train_step

from .conftest import TEXT

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
IDS = torch.tensor([[0] * 7 + [1] * 50 + [2] * 71, [0] * 128, [0] * 100 + [1] + [-1] * 27])


def far(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||."""
    wanted = wanted.double().cpu()
    return float((found.double().cpu() - wanted).norm() / wanted.norm())


def with_gradients(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, mask: Any) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, mask)
    out.backward(slope)
    return [out.detach(), *(t.grad for t in leaves if t.grad is not None)]


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_flash_over_documents_is_the_reference(kv_heads: int) -> None:
    torch.manual_seed(0)
    q, slope = torch.randn(2, 3, 8, 128, 64).unbind()
    k, v = torch.randn(2, 3, kv_heads, 128, 64).unbind()
    q, k, v, slope = (t.bfloat16().double() for t in (q, k, v, slope))
    wanted = with_gradients(q, k, v, slope, Documents(IDS).mask)
    mask = packed(IDS.to(GPU), torch.bfloat16, 64)
    assert isinstance(mask, Stretches)
    assert mask.cuts.tolist() == [0, 7, 57, 128, 256, 356, 357, 384]
    narrow = [t.bfloat16().to(GPU) for t in (q, k, v, slope)]
    found = with_gradients(*narrow, mask)
    for name, ours, true in zip(("out", "q", "k", "v"), found, wanted, strict=True):
        assert far(ours, true) < 1e-2, name


def test_a_document_that_comes_back_is_seen() -> None:
    """Its parts are not one stretch, so the whole square is masked instead."""
    ids = torch.tensor([[0, 0, 1, 0]], device=GPU)
    assert isinstance(packed(ids, torch.bfloat16, 64), Documents)


@pytest.fixture(scope="module")
def small() -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(vocab_size=400, max_position_embeddings=512, **SHAPE)).double()


def gradients(model: Llama, ids: Tensor, documents: Tensor | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast(model.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        states = model.hidden(ids.to(model.device), document_ids=None if documents is None else documents.to(ids))
        loss = linear_cross_entropy(
            states[:, :-1].flatten(0, 1), model.lm_head.weight, ids[:, 1:].flatten().to(model.device)
        )
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


@pytest.mark.parametrize(
    ("dtype", "autocast", "bound"), [("float64", None, 1e-6), ("float32", None, 1e-4), ("float32", "bfloat16", 6e-2)]
)
def test_loss_and_gradients_are_the_cpus(small: Llama, dtype: str, autocast: str | None, bound: float) -> None:
    # The tables of rotations are float32 everywhere, and two devices' cosines differ in the last bit.
    ids = torch.randint(0, 400, (3, 128), generator=torch.Generator().manual_seed(1))
    wanted = gradients(small, ids, IDS, None)
    model = Llama(small.config).double()
    model.load_state_dict(small.state_dict())
    model.to(GPU, getattr(torch, dtype))
    found = gradients(model, ids.to(GPU), IDS.to(GPU), getattr(torch, autocast) if autocast else None)
    for name, true in wanted.items():
        assert far(found[name], true) < bound, name


def test_a_neighbour_is_never_seen(small: Llama) -> None:
    model = Llama(small.config).to(GPU).bfloat16()
    ids = torch.randint(0, 400, (3, 128), device=GPU)
    other = ids.clone()
    other[0, :57] = (other[0, :57] + 1) % 400  # the first row's first two documents
    with torch.no_grad():
        one, two = (model.hidden(x, document_ids=IDS.to(GPU)) for x in (ids, other))
    assert torch.equal(one[0, 57:], two[0, 57:])
    assert torch.equal(one[1:], two[1:])
    assert not torch.equal(one[0, :57], two[0, :57])


def test_a_step_takes_the_cpus_way(small: Llama) -> None:
    """Whole and compiled layers: the losses of six steps, adapters included."""
    ids = torch.randint(0, 400, (3, 129), generator=torch.Generator().manual_seed(2))
    batch = Batch(ids[:, :-1], ids[:, 1:].clone(), IDS, False)
    settings = parse({"train": {"sequence_length": 128, "global_batch_tokens": 384, "dtype": "float32"}}).train
    for lora in (False, True):
        ways = {}
        for way in ("cpu", "cuda", "compiled"):
            model = Llama(small.config)
            model.load_state_dict(small.state_dict())
            model.to("cpu" if way == "cpu" else GPU)
            if lora:
                torch.manual_seed(5)
                adapt(model, LoraConfig(r=4))
            if way == "compiled":
                for layer in model.layers:
                    layer.compile()
            optimizer = optimizer_for(model.train(), settings)
            ways[way] = [train_step(model, optimizer, batch, settings, 1e-3).loss for _ in range(6)]
        assert ways["cuda"] == pytest.approx(ways["cpu"], rel=1e-3)
        assert ways["compiled"] == pytest.approx(ways["cpu"], rel=1e-3)
        assert ways["cpu"][-1] < ways["cpu"][0]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_learns_and_resumes(tokenizer: Tokenizer, tmp_path: Path, compiled: bool) -> None:
    tokens = tmp_path / "tokens"
    build(TEXT, tokenizer, tokens, [])
    train = {"steps": 30, "sequence_length": 64, "global_batch_tokens": 1024, "micro_batch_rows": 8,
             "learning_rate": 1e-2, "warmup_steps": 2, "compile": compiled}  # fmt: skip

    def go(out: str, resume: bool = False) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        sections = {"model": SHAPE, "data": {"tokens": str(tokens)}, "train": train,
                    "checkpoint": {"every": 10, "keep": 9}, "log": {"out": str(tmp_path / out)}}  # fmt: skip
        summary = pretrain(parse(sections), quiet=True, resume=resume)
        return summary, [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]

    whole, records = go("whole")
    assert records[0]["loss"] > 5
    assert records[-1]["loss"] < 3.5
    assert whole["planned"]["memory_bytes"] < 8 * whole["measured"]["memory_bytes"]
    go("cut")
    (tmp_path / "cut" / "checkpoints" / "step-00000030" / "camelid.json").unlink()
    _, again = go("cut", resume=True)
    assert [r["rows"] for r in again] == [r["rows"] for r in records]
    assert [r["loss"] for r in again] == pytest.approx([r["loss"] for r in records], rel=2e-2)


def test_greedy_text_is_the_cpus(small: Llama, tokenizer: Tokenizer, tmp_path: Path) -> None:
    small.float()
    prompts = [tokenizer.encode(text) for text in ("The meaning", "def area(", "骆驼")]
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    wanted = [r.ids for r in Engine(small, tokenizer).generate(prompts, params)]
    model = Llama(small.config)
    model.load_state_dict(small.state_dict())
    assert [r.ids for r in Engine(model.to(GPU), tokenizer).generate(prompts, params)] == wanted
    save(model, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recorded_steps_are_the_cpus(small: Llama, integers: bool, dtype: torch.dtype) -> None:
    """Texts that come and go, so that numbers of texts and of pages pass the sizes that were recorded, and two adapters
    in one step. In float32 by our own kernels, in float64 by torch's."""
    model = Llama(small.config).double()
    model.load_state_dict(small.double().state_dict())
    for name in ("one", "two"):
        torch.manual_seed(ord(name[0]))
        adapt(model, LoraConfig(r=4), name)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data.normal_(0, 0.02)
    prompts = [[(7 * n + i) % 400 for i in range(20 + 61 * n)] for n in range(6)]
    params = [
        SamplingParams(max_new_tokens=30 + 50 * (n % 3), ignore_eos=True, adapter=("one", "two")[n % 2], logprobs=2)
        for n in range(6)
    ]
    cpu = Engine(TorchRunner(model.to(dtype), integers)).generate(prompts, params)
    gpu = Engine(TorchRunner(model.to(GPU), integers)).generate(prompts, params)
    assert len({tuple(r.ids) for r in cpu}) == 6
    # RoPE's tables differ in their last bit, and a byte of the cache may be rounded the other way.
    bound = 1e-5 if dtype == torch.float64 else 1e-2 if integers else 1e-4
    for wanted, found in zip(cpu, gpu, strict=True):
        same_text(wanted, found, bound)


def same_text(wanted: Result, found: Result, bound: float) -> None:
    """The same log-probabilities up to the first token that was chosen among two as likely."""
    assert wanted.logprobs
    assert found.logprobs
    for one, other in zip(wanted.logprobs, found.logprobs, strict=True):
        if other.token != one.token:
            (_, best), (_, second) = one.top
            assert best - second < 2 * bound
            break
        assert other.logprob == pytest.approx(one.logprob, abs=bound)


@pytest.mark.parametrize("form", ["int8", "int4", None])
def test_a_folder_is_opened_on_the_gpu(small: Llama, tokenizer: Tokenizer, tmp_path: Path, form: str | None) -> None:
    """Rounded or not, read in chunks and written by graphs: the texts of the torch model on the CPU, whose inputs are
    not rounded either."""
    model = Llama(small.config)
    model.load_state_dict(small.state_dict())
    save(model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    engine = Engine.from_pretrained(tmp_path / "model", quantization=form)
    assert engine.model.device.type == "cuda"
    if form is not None:
        quantize_layers(model, BITS[form])
        quantize_head(model)
        keep_inputs(model)
    prompts = [[(7 * n + i) % 400 for i in range(20 + 61 * n)] for n in range(4)]
    params = SamplingParams(max_new_tokens=40, ignore_eos=True, logprobs=2)
    wanted = Engine(TorchRunner(model)).generate(prompts, params)
    for one, other in zip(wanted, engine.generate(prompts, params), strict=True):
        same_text(one, other, 1e-3)
    on_cpu = Engine.from_pretrained(tmp_path / "model", quantization=form, device="cpu")
    assert "on cuda" not in repr(on_cpu)


def test_a_draft_changes_nothing(small: Llama, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts whose guesses differ in number are read in one pass."""
    monkeypatch.setattr(drafts, "LEAST", 0.0)  # a model at random is never sure
    model, draft = Llama(small.config), Llama(small.config)
    for one in (model, draft):
        one.load_state_dict(small.state_dict())
    for weight in draft.parameters():
        weight.data += 0.0005 * torch.randn_like(weight)
    prompts = [tokenizer.encode(text) for text in ("The meaning", "def area(", "骆驼")]
    params = SamplingParams(max_new_tokens=40, ignore_eos=True, logprobs=2)
    wanted = Engine(model.to(GPU), tokenizer).generate(prompts, params)
    engine = Engine(model, tokenizer, draft=draft.to(GPU))
    for one, other in zip(wanted, engine.generate(prompts, params), strict=True):
        same_text(one, other, 1e-3)
    assert 0 < engine.scheduler.came_true < engine.scheduler.guessed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "integers"), [
    (8, 2, 64, False), (8, 2, 64, True), (4, 4, 80, False), (6, 2, 128, True), (32, 8, 64, False),
])  # fmt: skip
def test_attention_over_pages(dtype: torch.dtype, heads: int, kv_heads: int, size: int, integers: bool) -> None:
    """One token in each text, and chunks: the reference in float64 over what the pages hold."""
    from camelid.kernels.gpu.attention import attend, attend_chunks, blocks_of

    torch.manual_seed(0)
    counts, starts, bound = [70, 1, 33, 5], [0, 64, 40, 131], {torch.float32: 1e-6}.get(dtype, 5e-3)
    tables = torch.randperm(4 * 8)[: 4 * 8].view(4, 8).to(GPU)
    like = torch.zeros(1, dtype=dtype, device=GPU)
    keys, values = (Kept.room(32, kv_heads, size, like, integers) for _ in range(2))
    everywhere = torch.arange(32, device=GPU)[:, None].expand(32, 32), torch.arange(32, device=GPU).expand(32, 32)
    for kept in (keys, values):
        kept.write(torch.randn(32, 32, kv_heads, size, device=GPU).to(dtype), *everywhere)
    worth = (keys.worth, values.worth) if keys.worth is not None and values.worth is not None else None

    def expected(q: Tensor, text: int, start: int) -> Tensor:
        """q [tokens, heads, size] of the text's tokens from `start` on."""
        held = [
            (k.data.double() * (1.0 if k.worth is None else k.worth.double()))[tables[text]] for k in (keys, values)
        ]
        k, v = (h.flatten(0, 1)[: start + len(q)].repeat_interleave(heads // kv_heads, 1).transpose(0, 1) for h in held)
        seen = torch.arange(start + len(q), device=GPU) <= torch.arange(start, start + len(q), device=GPU)[:, None]
        return attention(q.double().transpose(0, 1)[None], k[None], v[None], seen)[0].transpose(0, 1)

    q = torch.randn(sum(counts), heads, size, device=GPU).to(dtype)
    firsts = [sum(counts[:n]) for n in range(4)]
    texts = torch.tensor(list(zip(firsts, counts, starts, strict=True)), device=GPU)
    blocks = torch.tensor(blocks_of(counts, heads // kv_heads), device=GPU)
    found = attend_chunks(q, (keys.data, values.data), worth, tables, texts, blocks)
    for text, (first, count, start) in enumerate(zip(firsts, counts, starts, strict=True)):
        assert far(found[first : first + count], expected(q[first : first + count], text, start)) < bound

    new = tuple(torch.randn(4, kv_heads, size, device=GPU).to(dtype) for _ in range(2))
    ends = torch.tensor([s + c for s, c in zip(starts, counts, strict=True)], device=GPU)
    # Strided, as a graph's are.
    wide = torch.cat((ends[:, None], tables), 1)
    found = attend(q[:4], (new[0], new[1]), (keys.data, values.data), worth, wide[:, 1:], wide[:, 0])
    for text in range(4):
        end = int(ends[text])
        assert far(found[text], expected(q[text][None], text, end)[0]) < bound
        for kept, one in zip((keys, values), new, strict=True):
            place = tables[text, end // 32], end % 32
            step = 0 if kept.worth is None else 0.51 * float(kept.worth[place].max())
            written = kept.data[place].double() * (1.0 if kept.worth is None else kept.worth[place].double())
            assert float((written - one[text].double()).abs().max()) <= step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("group", "symmetric"), [(32, True), (32, False), (128, True)])
def test_products_with_integers(dtype: torch.dtype, bits: int, group: int, symmetric: bool) -> None:
    from camelid.kernels.gpu.products import product, widened

    torch.manual_seed(0)
    kept = round_to_nearest(torch.randn(1000, 1152, device=GPU), bits, group, symmetric)
    parts = kept.packed, kept.scale, kept.zero
    dense, bias = kept.dense().double(), torch.randn(1000, device=GPU).to(dtype)
    assert torch.equal(widened(*parts, bits, torch.float32), kept.dense())
    for inputs in (1, 3, 40, 100):
        x = torch.randn(inputs, 1152, device=GPU).to(dtype)
        wanted = torch.nn.functional.linear(x.double(), dense, bias.double())
        assert far(product(x, *parts, bias, bits), wanted) < (1e-5 if dtype == torch.float32 else 6e-3)


def test_passes_over_vectors() -> None:
    """Norm, rotation and gate, of heads that lie as a projection leaves them."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 6 * 80, device=GPU), torch.randn(480, device=GPU)
    heads = x.view(3, 5, 6, 80).transpose(1, 2)
    with torch.inference_mode():
        found = [rms_norm(x, weight, 1e-5), swiglu(x, x.flip(0))]
        turns = [Rotation(*torch.randn(2, *shape, 5, 40, device=GPU).unbind()) for shape in ((), (3,))]
        found += [rotate(heads, turn) for turn in turns]
    wanted = [rms_norm(x, weight, 1e-5), swiglu(x, x.flip(0)), *(rotate(heads, turn) for turn in turns)]
    for ours, true in zip(found, wanted, strict=True):
        assert far(ours, true) < 1e-6


def test_texts_that_draw_alike_draw_together(small: Llama) -> None:
    """The texts that each would have drawn alone, by whatever filters."""
    model = Llama(small.config).double()
    model.load_state_dict(small.double().state_dict())
    engine = Engine(model.to(GPU))
    filters: list[dict[str, Any]] = [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}, {"typical_p": 0.7}]
    params = [
        SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=1.0, seed=n, **filters[n % 5]) for n in range(15)
    ]
    prompts = [[5, 7, n] for n in range(15)]
    alone = [engine.generate([prompt], [one])[0].ids for prompt, one in zip(prompts, params, strict=True)]
    assert [r.ids for r in engine.generate(prompts, params)] == alone
    assert len(set(map(tuple, alone))) == 15


def test_a_chunk_is_one_compiled_pass() -> None:
    """Also where the last chunk is short, and where the number of tokens changes between calls."""
    torch.manual_seed(0)
    weight = torch.randn(50_000, 64, dtype=torch.float64)
    for tokens in (6000, 6001, 77):
        states, labels = torch.randn(tokens, 64, dtype=torch.float64), torch.randint(0, 50_000, (tokens,))
        found = []
        for kind, dtype in ((torch.device("cpu"), torch.float64), (GPU, torch.float32)):
            leaves = [t.detach().to(kind, dtype).requires_grad_() for t in (states, weight)]
            loss = linear_cross_entropy(*leaves, labels.to(kind), 1e-4)
            (loss / tokens).backward()
            found.append([loss.detach(), *(t.grad for t in leaves if t.grad is not None)])
        for true, ours in zip(*found, strict=True):
            assert far(ours, true) < 1e-5
