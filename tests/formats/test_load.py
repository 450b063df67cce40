"""Opening a model in whole numbers: rounded as it is read, or as a GGUF file has it; and what stays in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from camelid.cli import info
from camelid.errors import FormatError, InputError
from camelid.formats import gguf_file, safetensors_file
from camelid.formats.convert import convert
from camelid.formats.gguf_file import parse
from camelid.formats.hf import save
from camelid.formats.load import load
from camelid.generate.engine import Engine
from camelid.generate.native import NativeRunner
from camelid.generate.place import weight_bytes, widening
from camelid.generate.runner import Chunk
from camelid.generate.sampling import SamplingParams
from camelid.kernels import packed
from camelid.kernels.library import library
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.quantized import QuantizedEmbedding, QuantizedLinear, quantize_layers, without_least
from camelid.quantize.job import Wish, quantize
from camelid.tokenizer.tokenizer import Tokenizer

needs_library = pytest.mark.skipif(library() is None, reason="the native library is not built")
PARAMS = SamplingParams(max_new_tokens=12, temperature=0.0)
PROMPT = [5, 40, 7, 100, 30]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer, tokenizers: dict[str, Path]) -> Path:
    """Random weights in bfloat16, with biases, of a shape whose rows fill blocks of 256."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = Llama(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save(model.bfloat16(), tmp_path / "model")
    for file in tokenizers["byte-level"].iterdir():
        shutil.copy(file, tmp_path / "model")
    return tmp_path / "model"


def tie(folder: Path) -> None:
    """Make the model's output projection its embedding."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def same(first: Llama, second: Llama) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_while_it_is_read_is_rounded_afterwards(folder: Path, bits: int, dtype: torch.dtype | None) -> None:
    whole: Llama = load(folder, dtype=dtype)
    quantize_layers(whole, bits)
    read: Llama = load(folder, dtype=dtype, bits=bits)
    same(read, whole)
    assert read.dtype == whole.dtype
    assert not isinstance(read.lm_head, QuantizedLinear)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k_m", "q6_k", "f16"])
def test_a_gguf_files_layers_in_whole_numbers(folder: Path, kind: str, tmp_path: Path) -> None:
    """Those of Q8_0 and Q4_0 are the file's, those of Q4_K but for the rounding of scales; others are off by half a
    step of 127 at most; what is not rounded there is not rounded here."""
    path = tmp_path / "m.gguf"
    convert(folder, path, "gguf", kind=kind.upper())
    dense: Llama = load(path)
    weights = dict(dense.named_parameters())
    kept = (QuantizedLinear, QuantizedEmbedding)
    found = {n: m for n, m in load(path, integers=True).named_modules() if isinstance(m, kept)}
    assert len(found) == (0 if kind == "f16" else 16)
    for name, layer in found.items():
        meant = weights[f"{name}.weight"].detach()
        if kind == "q8_0" or (kind == "q4_0" and layer.bits == 4):
            assert layer.bits == int(kind[1])
            assert torch.equal(layer.integers().dense(), meant), name
        elif layer.bits == 4:
            assert kind == "q4_k_m"
            assert (layer.integers().dense() - meant).abs().max() < 1e-3 * meant.abs().max()
        else:
            most = meant.view(len(meant), -1, 32).abs().amax(-1).repeat_interleave(32, 1)
            assert ((layer.integers().dense() - meant).abs() <= most / 254 * 1.01).all(), name
        if name.startswith("layers."):
            assert isinstance(layer, QuantizedLinear)
            assert torch.equal(layer.bias, weights[f"{name}.bias"])


@needs_library
@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k_m"])
def test_a_tied_embedding_is_kept_once(folder: Path, kind: str, tmp_path: Path) -> None:
    tie(folder)
    convert(folder, tmp_path / "m.gguf", "gguf", kind=kind.upper())
    whole: Llama = load(tmp_path / "m.gguf", integers=True)
    assert isinstance(whole.embed_tokens, QuantizedEmbedding)
    assert isinstance(whole.lm_head, QuantizedLinear)
    assert whole.lm_head.packed.data_ptr() == whole.embed_tokens.packed.data_ptr()
    meant = whole.lm_head.dense()[PROMPT]
    assert torch.equal(whole.embed_tokens(torch.tensor([PROMPT]))[0], meant)
    with torch.inference_mode():
        expected = whole(torch.tensor([PROMPT])).logits[0]
    runner = NativeRunner(whole, cache=torch.float32)
    runner.reserve(1)
    [found] = runner.run([Chunk(PROMPT, 0, [0], len(PROMPT))])
    assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()  # of values at the edge of two steps


@needs_library
@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k_m"])
def test_the_engine_keeps_a_gguf_file_in_whole_numbers(folder: Path, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    convert(folder, path, "gguf", kind=kind.upper())
    whole, dense = (Engine.from_pretrained(path, dtype=d, device="cpu") for d in (None, torch.float32))
    assert isinstance(whole.runner, NativeRunner)
    assert isinstance(dense.runner, NativeRunner)
    assert whole.runner.weight_bytes < 0.4 * dense.runner.weight_bytes
    expected = NativeRunner(load(path, integers=True))
    expected.reserve(4)
    whole.runner.reserve(4)
    chunk = Chunk(PROMPT, 0, [0])
    assert torch.equal(whole.runner.run([chunk])[0], expected.run([chunk])[0])
    asked = Engine.from_pretrained(path, quantization="int4", device="cpu").runner
    assert isinstance(asked, NativeRunner)
    assert asked.weight_bytes == NativeRunner(load(path, bits=4)).weight_bytes


@needs_library
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m", "int4"])
def test_what_a_quantised_model_takes_is_told_before(folder: Path, kind: str, tied: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    if tied:
        tie(folder)
    if kind == "int4":
        path = tmp_path / "small"
        quantize(folder, path, Wish("int4"))
    else:
        convert(folder, path, "gguf", kind=kind.upper())
    runner = Engine.from_pretrained(path, device="cpu").runner
    assert isinstance(runner, NativeRunner)
    rows = runner._decoder._embedding
    held = runner.weight_bytes + sum(t.nbytes for t in (rows.values, rows.scale, rows.least) if t is not None)
    assert info._model(str(path))["bytes_to_run"]["as it is"] == pytest.approx(held, rel=0.02)


def test_rounded_some_rows_at_a_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(folder, tmp_path / "m.gguf", "gguf", kind="Q6_K")
    whole: Llama = load(tmp_path / "m.gguf", integers=True)
    monkeypatch.setattr(gguf_file, "AT_ONCE", 3 * 256 + 100)
    same(load(tmp_path / "m.gguf", integers=True), whole)


def test_a_gpu_gets_them_around_a_middle(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    convert(folder, path, "gguf", kind="Q4_K_M")
    model: Llama = load(path, integers=True)
    ids = torch.tensor([PROMPT])
    before = model(ids).logits
    with pytest.raises(InputError, match="least values"):
        save(model, tmp_path / "folder")
    assert any(m.least is not None for m in model.modules() if isinstance(m, QuantizedLinear))
    expected = weight_bytes(model) + widening(model)
    without_least(model)
    assert weight_bytes(model) == expected
    assert all(m.least is None for m in model.modules() if isinstance(m, QuantizedLinear))
    after = model(ids).logits
    assert 0 < (after - before).abs().mean() < 0.05 * before.abs().mean()


def test_a_scale_that_is_no_number_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    convert(folder, path, "gguf", kind="Q8_0")
    at = parse(path).tensors["blk.1.ffn_up.weight"].start
    data = bytearray(path.read_bytes())
    data[at : at + 2] = b"\x00\x7e"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"'blk.1.ffn_up.weight' has a scale that is NaN or infinite"):
        load(path, integers=True)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_the_engine_rounds_as_the_runner_does(folder: Path, form: str) -> None:
    """A model that the native decoder took apart gives what one gives that it left whole."""
    engine = Engine.from_pretrained(folder, quantization=form, device="cpu")
    model: Llama = load(folder)
    quantize_layers(model, int(form[3:]))
    ours = engine.generate([PROMPT], PARAMS)[0]
    if isinstance(engine.runner, NativeRunner):
        kept = Engine(NativeRunner(model), None, engine.stop_ids)
        assert kept.generate([PROMPT], PARAMS)[0].ids == ours.ids
        assert len(model.layers) == 2
    quantize(folder, folder.parent / "small", Wish("int8"))
    with pytest.raises(InputError, match="quantised already"):
        load(folder.parent / "small", bits=8)


@needs_library
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_is_taken_apart_leaves_its_file_and_its_memory(
    folder: Path, tied: bool, bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "SMALL", 0)  # all tensors are looked at where the file is mapped
    monkeypatch.setattr(packed, "PIECE", 4096)
    if tied:
        tie(folder)
    found = []
    for keep in (True, False):
        model: Llama = load(folder, bits=bits, head=True)
        assert isinstance(model.lm_head, QuantizedLinear) == (bits is not None and not tied)
        runner = NativeRunner(model, keep=keep)
        runner.reserve(4)
        found += runner.run([Chunk(PROMPT, 0, [0])])
        assert len(model.layers) == (2 if keep else 0)
        del model
        if Path("/proc/self/maps").exists():
            assert str(folder) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert torch.equal(*found)


def test_a_file_that_is_mapped_anew_is_read_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected: Llama = load(folder)
    monkeypatch.setattr(safetensors_file, "MAPPED", 1 << 16)
    opened, real = list[Path](), safetensors.safe_open

    def counted(path: Path, **more: Any) -> Any:
        opened.append(path)
        return real(path, **more)

    monkeypatch.setattr(safetensors, "safe_open", counted)
    same(load(folder), expected)
    assert len(opened) > 10
