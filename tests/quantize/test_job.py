"""Quantised folders: other tools open them and compute the same, the engine runs them, and what is told is measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from camelid.cli import run
from camelid.errors import FormatError, InputError
from camelid.evaluate.perplexity import perplexity
from camelid.evaluate.texts import read_texts
from camelid.formats.convert import convert
from camelid.formats.hf import save
from camelid.formats.load import load, load_tokenizer, open_model
from camelid.generate.engine import Engine
from camelid.generate.sampling import SamplingParams
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.quantized import QuantizedLinear, quantize_head
from camelid.quantize.job import Wish, quantize
from camelid.tokenizer.tokenizer import Tokenizer
from tests.conftest import TEXT

SHAPES = {"plain": {}, "tied": {"tie_word_embeddings": True}, "biases": {"attention_bias": True}}
WISHES = {
    "int8": Wish("int8"), "int4": Wish("int4"), "int4 with zeros": Wish("int4", 64, symmetric=False),
    "int8 rows": Wish("int8", None), "int8 with zeros": Wish("int8", 32, symmetric=False),
}  # fmt: skip


def source(folder: Path, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, **changes,
    )  # fmt: skip
    model = Llama(config)
    for name, weight in model.named_parameters():
        weight.data.mul_(3) if weight.dim() > 1 else None
        weight.data.add_(0.3) if name.endswith("bias") else None
    save(model.to(dtype), folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXT[:40]))
    return path


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wish", [name for name, wish in WISHES.items() if wish.symmetric])
def test_transformers_opens_it_and_computes_the_same(
    shape: str, wish: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    import transformers

    quantize(source(tmp_path / "full", tokenizer, **SHAPES[shape]), tmp_path / "small", WISHES[wish])
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    ours: Llama = load(tmp_path / "small", dtype=torch.float32)
    for module in ours.modules():
        if isinstance(module, QuantizedLinear):
            module.rounds_inputs = False  # transformers does not
    ids = torch.randint(0, len(tokenizer), (2, 40))
    with torch.inference_mode():
        expected, found = theirs.eval()(ids).logits, ours(ids).logits
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("wish", WISHES)
def test_compressed_tensors_reads_the_same_weights(wish: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Its own decompression; transformers does not open packed zeros (it expects them unpacked)."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    quantize(source(tmp_path / "full", tokenizer), tmp_path / "small", WISHES[wish])
    raw = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig(**raw).config_groups["group_0"]
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    ours: Llama = load(tmp_path / "small", dtype=torch.float32)
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            parts = {k.rpartition(".")[2]: t for k, t in tensors.items() if k.startswith(f"model.{name}.")}
            parts["weight_scale"] = parts["weight_scale"].float()  # their product is in its dtype
            theirs = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
            assert torch.equal(module.dense(), theirs), name


@pytest.mark.parametrize("wish", WISHES)
def test_what_is_written_is_what_was_measured(wish: str, tmp_path: Path, tokenizer: Tokenizer, text: Path) -> None:
    full = source(tmp_path / "full", tokenizer)
    asked = Wish(**{**WISHES[wish].__dict__, "data": str(text)})
    told = quantize(full, tmp_path / "small", asked)
    texts = read_texts(text, tokenizer)
    assert told["before"]["token_perplexity"] == pytest.approx(
        perplexity(load(full, dtype=torch.float32), tokenizer, texts)["token_perplexity"], rel=1e-6
    )
    opened: Llama = load(tmp_path / "small", dtype=torch.float32)
    quantize_head(opened)
    total, count = 0.0, 0
    kls = []
    exact: Llama = load(full, dtype=torch.float32)
    for one in texts:
        ids = [tokenizer.bos_token_id, *one.ids]
        for start in range(0, len(ids) - 1, 128):
            window = torch.tensor([ids[start : start + 129]])
            with torch.inference_mode():
                q = opened(window[:, :-1]).logits[0].log_softmax(-1)
                p = exact(window[:, :-1]).logits[0].log_softmax(-1)
            total -= float(q.gather(1, window[0, 1:, None]).sum())
            kls.append((p.exp() * (p - q)).sum(-1))
            count += window.shape[1] - 1
    assert told["after"]["token_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert told["kl"] == pytest.approx(float(torch.cat(kls).mean()), rel=1e-3)
    assert told["tokens"] == count
    assert 0 <= told["top1_agreement"] <= 1
    assert told["kl"] < told["kl_p999"]
    assert "KL divergence" in (tmp_path / "small" / "report.html").read_text()


def test_the_engine_runs_it_as_torch_does(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(source(tmp_path / "full", tokenizer), tmp_path / "small", WISHES["int4 with zeros"])
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    native = Engine.from_pretrained(tmp_path / "small").generate(["Numbers", "骆驼"], params)
    monkeypatch.setattr("camelid.kernels.decoder.library", lambda: None)
    plain = Engine.from_pretrained(tmp_path / "small")
    assert isinstance(plain.model.lm_head, QuantizedLinear)
    slow = plain.generate(["Numbers", "骆驼"], params)
    same = sum(a == b for r, s in zip(native, slow, strict=True) for a, b in zip(r.ids, s.ids, strict=True))
    assert same >= 40  # of 60: one tie taken the other way changes what follows


def test_gptq_and_the_cost_of_each_layer(tmp_path: Path, tokenizer: Tokenizer, text: Path) -> None:
    full = source(tmp_path / "full", tokenizer)
    asked = Wish("int4", data=str(text), by_layer=True)
    nearest = quantize(full, tmp_path / "a", asked)
    better = quantize(full, tmp_path / "b", Wish(**{**asked.__dict__, "calibration": str(text)}))
    assert better["kl"] < nearest["kl"]
    assert [row["layer"] for row in nearest["layers"]] == [0, 1]
    assert all(0 < row["kl"] < nearest["kl"] for row in nearest["layers"])
    assert "GPTQ on" in better["method"]
    assert "calibrated on a text that this is measured on" in better["protocol"]
    assert "calibrated" not in nearest["protocol"]
    assert "<svg" in (tmp_path / "a" / "report.html").read_text()


def test_keys_and_values_in_bytes_are_measured_too(tmp_path: Path, tokenizer: Tokenizer, text: Path) -> None:
    full = source(tmp_path / "full", tokenizer)
    plain = quantize(full, tmp_path / "a", Wish("int8", data=str(text)))
    both = quantize(full, tmp_path / "b", Wish("int8", data=str(text), kv_cache=True))
    assert plain["kl"] < both["kl"] < 4 * plain["kl"]
    assert "keys and values int8" in both["protocol"]
    assert "keys and values" not in plain["protocol"]


def test_dtypes_and_sizes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    full = source(tmp_path / "full", tokenizer, torch.bfloat16)
    told = quantize(full, tmp_path / "small", Wish("int4"))
    opened: Llama = load(tmp_path / "small")
    assert opened.dtype == torch.bfloat16
    assert opened.layers[0].mlp.up_proj.dense().dtype == torch.bfloat16
    assert told["after"]["bytes"] < told["before"]["bytes"]
    assert open_model(tmp_path / "small").quantized == "int4, groups of 32"


def test_it_can_be_written_in_full_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    quantize(source(tmp_path / "full", tokenizer), tmp_path / "small", Wish("int8"))
    convert(tmp_path / "small", tmp_path / "wide")
    small, wide = (load(tmp_path / name, dtype=torch.float32) for name in ("small", "wide"))
    assert torch.equal(wide.layers[1].mlp.down_proj.weight, small.layers[1].mlp.down_proj.dense())
    assert open_model(tmp_path / "wide").quantized is None
    convert(tmp_path / "small", tmp_path / "small.gguf", "gguf", kind="F32")
    again: Llama = load(tmp_path / "small.gguf")
    assert torch.equal(again.layers[0].self_attn.q_proj.weight, wide.layers[0].self_attn.q_proj.weight)


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_what_is_no_number_is_not_hidden(tmp_path: Path, tokenizer: Tokenizer, damage: float, format: str) -> None:
    folder = source(tmp_path / "m", tokenizer)
    model = load(folder)
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[3, 3] = damage
    save(model, folder)
    tokenizer.save(folder)
    with pytest.raises(InputError, match="NaN or infinite"):
        quantize(folder, tmp_path / "q", Wish(format))


def test_the_command(tmp_path: Path, tokenizer: Tokenizer, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = source(tmp_path / "full", tokenizer)
    command = ["quantize", str(full), "--format", "int4", "--data", str(text), "--out", str(tmp_path / "q"), "--json"]
    assert run(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"before", "after", "kl", "top1_agreement", "out"} <= told.keys()
    assert run([*command[:-3], "--out", str(tmp_path / "r")]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert run(["quantize", str(tmp_path / "q"), "--format", "int8", "--out", str(tmp_path / "s")]) == 2
    assert "quantised already" in capsys.readouterr().err
    for wrong, why in (
        (["--group", "96"], "whole groups"), (["--group", "many"], "--group many"),
        (["--group", "16"], "multiple of 32"), (["--group", "0"], "multiple of 32"), (["--tokens", "0"], "--tokens 0"),
        (["--kv-cache", "int8"], "needs --data"),
        (["--by-layer"], "name one with --data"),
        (["--out", str(full)], "the model itself"), (["--out", str(full / "inside")], "the model itself"),
    ):  # fmt: skip
        assert run(["quantize", str(full), "--format", "int8", "--out", str(tmp_path / "s"), *wrong]) == 2
        assert why in capsys.readouterr().err


def test_a_quantised_model_can_be_saved_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    quantize(source(tmp_path / "full", tokenizer), tmp_path / "small", WISHES["int8 rows"])
    first: Llama = load(tmp_path / "small")
    save(first, tmp_path / "again")
    again: Llama = load(tmp_path / "again")
    ids = torch.randint(0, len(tokenizer), (1, 9))
    with torch.inference_mode():
        assert torch.equal(first(ids).logits, again(ids).logits)
    quantize_head(first)
    with pytest.raises(InputError, match="output projection"):
        save(first, tmp_path / "no")


def test_what_is_rounded_is_not_rounded_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    quantize(source(tmp_path / "full", tokenizer), tmp_path / "small", Wish("int4"))
    with pytest.raises(InputError, match="quantised already"):
        Engine.from_pretrained(tmp_path / "small", quantization="int8")


def test_an_adapter_on_a_quantised_folder_learns_with_true_slopes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from camelid.model.lora import LoraConfig, adapt
    from camelid.model.quantized import keep_inputs, make_dense

    quantize(source(tmp_path / "full", tokenizer), tmp_path / "small", Wish("int8"))
    slopes = []
    for dense in (False, True):
        model: Llama = load(tmp_path / "small", dtype=torch.float32)
        make_dense(model) if dense else keep_inputs(model)
        adapt(model, LoraConfig(target_modules=("q_proj", "v_proj")), seed=1)
        model(torch.arange(20)[None]).logits.square().mean().backward()
        slopes.append([p.grad for n, p in model.named_parameters() if "lora_B" in n])
    for ours, true in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-7)


def test_doors_that_are_shut(tmp_path: Path, tokenizer: Tokenizer) -> None:
    full = source(tmp_path / "full", tokenizer)
    with pytest.raises(InputError, match="threads must be at least 1"):
        Engine.from_pretrained(full, threads=0)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is an adapter"):
        quantize(tmp_path / "adapter", tmp_path / "out", Wish("int8"))
    raw = json.loads((full / "config.json").read_text()) | {"quantization_config": ["int8"]}
    (full / "config.json").write_text(json.dumps(raw))
    with pytest.raises(FormatError, match="is a list"):
        load(full)


def change(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    weights = raw["quantization_config"]["config_groups"]["group_0"]["weights"]
    for name, value in changes.items():
        target = weights if name in weights else raw["quantization_config"]
        target[name] = value
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"quant_method": "bitsandbytes"}, "bitsandbytes"), ({"format": "float-quantized"}, "float-quantized"),
     ({"num_bits": 3}, "3 bits"), ({"strategy": "tensor"}, "tensor"), ({"config_groups": {}}, "one group"),
     ({"kv_cache_scheme": {"num_bits": 8}}, "cache"), ({"group_size": 64}, "weight_scale"),
     ({"num_bits": 8}, "weight_packed"), ({"symmetric": False}, "weight_zero_point")],
)  # fmt: skip
def test_what_a_config_must_not_say(changes: dict[str, Any], why: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    quantize(source(tmp_path / "full", tokenizer), tmp_path / "small", Wish("int4"))
    change(tmp_path / "small", **changes)
    with pytest.raises(InputError, match=why):
        load(tmp_path / "small")


@pytest.mark.parametrize(
    ("part", "made", "why"),
    [("weight_shape", torch.tensor([64, 64, 1]), "two whole numbers"),
     ("weight_shape", torch.tensor([64, 0]), "whole words"), ("weight_shape", torch.tensor([-1, 64]), "whole words"),
     ("weight_scale", torch.full((64, 2), torch.nan), "no scale"),
     ("weight_scale", torch.ones(64, 3), "needs"), ("weight_packed", torch.zeros(64, 9, dtype=torch.int32), "needs"),
     ("weight_packed", torch.zeros(64, 8, dtype=torch.int64), "needs"), ("weight_packed", None, "is missing")],
)  # fmt: skip
def test_tensors_that_do_not_fit(
    part: str, made: torch.Tensor | None, why: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    from safetensors.torch import load_file, save_file

    quantize(source(tmp_path / "full", tokenizer), tmp_path / "small", Wish("int4"))
    path = tmp_path / "small" / "model.safetensors"
    tensors, name = load_file(path), f"model.layers.0.self_attn.q_proj.{part}"
    if made is None:
        del tensors[name]
    else:
        tensors[name] = made
    save_file(tensors, path)
    with pytest.raises(FormatError, match=why):
        load(tmp_path / "small")


def test_only_a_blocks_layers_can_be_quantised(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from safetensors.torch import load_file, save_file

    quantize(source(tmp_path / "full", tokenizer), tmp_path / "small", Wish("int8"))
    path = tmp_path / "small" / "model.safetensors"
    tensors = load_file(path)
    moved = {name.replace("layers.0.self_attn.q_proj", "layers.7.self_attn.q_proj"): t for name, t in tensors.items()}
    save_file(moved, path)
    with pytest.raises(FormatError, match=r"layers\.7\.self_attn\.q_proj"):
        load(tmp_path / "small")
    assert load_tokenizer(tmp_path / "small").digest() == tokenizer.digest()


def test_what_a_gguf_copy_costs(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    """Against a computation of its own from both models' logits."""
    full = source(tmp_path / "full", tokenizer)
    text = tmp_path / "valid.txt"
    text.write_text("The meaning of life is a question. " * 4)
    words = ["convert", str(full), "--to", "gguf", "--type", "q4_0", "--out", str(tmp_path / "x.gguf")]
    assert run([*words, "--data", str(text), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["cost"]
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text.read_text(), add_special_tokens=False)]])
    assert ids.shape[1] <= 128
    with torch.inference_mode():
        p, q = (load(m, dtype=torch.float32)(ids).logits[0, :-1].log_softmax(-1) for m in (full, tmp_path / "x.gguf"))
    labels = ids[0, 1:, None]
    assert told["token_perplexity_before"] == pytest.approx(float((-p.gather(1, labels).mean()).exp()), rel=1e-4)
    assert told["token_perplexity_after"] == pytest.approx(float((-q.gather(1, labels).mean()).exp()), rel=1e-4)
    assert told["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert told["kl"] > 1e-6
    assert "Q4_0, Q8_0 weights as they are meant" in told["protocol"]


def test_a_method_without_a_text_and_a_text_that_is_not_there(tmp_path: Path, tokenizer: Tokenizer) -> None:
    full = source(tmp_path / "full", tokenizer)
    with pytest.raises(InputError, match="--method awq needs --calibration"):
        quantize(full, tmp_path / "out", Wish("int4", method="awq"))
    words = ["convert", str(full), "--to", "gguf", "--out", str(tmp_path / "x.gguf"), "--data"]
    assert run([*words, str(tmp_path / "typo.txt")]) == 2
    assert not (tmp_path / "x.gguf").exists()  # told before the work


def test_a_layer_that_is_there_twice(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from safetensors.torch import load_file, save_file

    quantize(source(tmp_path / "full", tokenizer), tmp_path / "small", Wish("int8"))
    path = tmp_path / "small" / "model.safetensors"
    tensors = load_file(path) | {"model.layers.0.mlp.up_proj.weight": torch.zeros(128, 64)}
    save_file(tensors, path)
    with pytest.raises(FormatError, match=r"up_proj is there twice"):
        load(tmp_path / "small")


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_a_scaled_model_opens_elsewhere(tmp_path: Path, tokenizer: Tokenizer, method: Any) -> None:
    """What is left of scaling is a plain model: our engine and the torch model compute the same from its folder."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TEXT), encoding="utf-8")
    full = source(tmp_path / "full", tokenizer, torch.bfloat16)
    wish = Wish("int4", calibration=str(text), method=method, data=str(text))
    told = quantize(full, tmp_path / "small", wish)
    assert method.upper() in told["method"]
    opened: Llama = load(tmp_path / "small", dtype=torch.float32)
    assert told["after"]["token_perplexity"] < 2 * told["before"]["token_perplexity"]
    changed = opened.layers[0].input_layernorm.weight
    kept: Llama = load(full, dtype=torch.float32)
    assert not torch.equal(changed, kept.layers[0].input_layernorm.weight)
