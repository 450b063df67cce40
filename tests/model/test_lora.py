"""Adapters: nothing at first, equal to their merged weights, and to PEFT's own to 1e-9."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from camelid.errors import FormatError, InputError
from camelid.formats import load, save
from camelid.formats.adapter import attach, write_adapter
from camelid.formats.load import load_adapters, load_tokenizer
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.lora import AdaptedLinear, Lora, LoraConfig, adapt, merge, use_adapter
from camelid.model.quantized import quantize_layers, quantized

KINDS: list[dict[str, Any]] = [
    {}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ("q_proj", "v_proj"), "r": 3, "lora_alpha": 5.0},
]  # fmt: skip


def moved(model: Llama, config: LoraConfig, name: str = "default", seed: int = 0) -> Llama:
    """An adapter that does something."""
    adapt(model, config, name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, p in model.named_parameters():
        if f".adapters.{name}." in parameter_name:
            p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def ids(config: LlamaConfig) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nothing_at_first_and_merged_is_the_same(model: Llama, kind: dict[str, Any]) -> None:
    x = ids(model.config)
    plain = model(x).logits
    fresh = copy.deepcopy(model)
    adapt(fresh, LoraConfig(**kind))
    torch.testing.assert_close(fresh(x).logits, plain, rtol=0, atol=1e-12)
    assert {n.split(".adapters.default.")[1] for n, p in fresh.named_parameters() if p.requires_grad} == {
        "lora_A", "lora_B", *(["lora_magnitude_vector"] if kind.get("use_dora") else []),
    }  # fmt: skip
    tuned = moved(copy.deepcopy(model), LoraConfig(**kind))
    with_adapter = tuned(x).logits
    assert (with_adapter - plain).abs().max() > 1e-3
    use_adapter(tuned, None)
    assert torch.equal(tuned(x).logits, plain)
    merge(tuned, "default")
    assert not any(isinstance(m, AdaptedLinear) for m in tuned.modules())
    torch.testing.assert_close(tuned(x).logits, with_adapter, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_peft_computes_the_same(tiny: LlamaConfig, tmp_path: Path, kind: dict[str, Any]) -> None:
    """Our adapter's files opened by PEFT: logits and gradients to 1e-9; and PEFT's files opened here."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    base = Llama(tiny).double()
    save(base, tmp_path / "base")
    config = LoraConfig(**kind)
    ours = moved(load(tmp_path / "base"), config)
    (tmp_path / "adapter").mkdir()
    tensors = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    write_adapter(config, tensors, tmp_path / "adapter", tmp_path / "base", {})

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(
        theirs, tmp_path / "adapter", is_trainable=True, autocast_adapter_dtype=False
    ).double()
    x = ids(tiny)
    found, expected = ours(x).logits, theirs(input_ids=x).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    for logits in (found, expected):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    gradients = {n.removesuffix(".weight"): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert len(gradients) == len(tensors)
    for name, parameter in tensors.items():
        layer, _, part = name.replace(".adapters.default", "").rpartition(".")
        its = gradients[f"base_model.model.model.{layer}.{part}.default"]
        torch.testing.assert_close(parameter.grad, its, rtol=0, atol=1e-9)

    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter += 0.05
    theirs.save_pretrained(tmp_path / "back")
    described = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    described["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "back" / "adapter_config.json").write_text(json.dumps(described))
    back = load(tmp_path / "back")
    torch.testing.assert_close(back(x).logits.double(), theirs(input_ids=x).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pattern", ["all-linear", r".*\.(gate|up|down|[qkvo])_proj"])
def test_folders_as_trainers_leave_them(tiny: LlamaConfig, tmp_path: Path, pattern: str) -> None:
    """A .bin of 2023, layers by a pattern, the base's config.json beside them, a pad token that the base has no row
    for."""
    save(Llama(tiny), tmp_path / "base")
    tuned = moved(load(tmp_path / "base"), LoraConfig())
    folder = tmp_path / "a"
    folder.mkdir()
    tensors = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    write_adapter(LoraConfig(), tensors, folder, tmp_path / "base", {})
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": pattern}))
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    x = ids(tiny)
    assert torch.equal(load(folder)(x).logits, tuned(x).logits)


def test_an_adapters_tokenizer_has_no_more_tokens_than_its_base_rows(
    tiny: LlamaConfig, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tokenizers["sentencepiece"], tmp_path / "a")
    size = len(load_tokenizer(folder))
    described = json.loads((folder / "tokenizer.json").read_text())
    described["added_tokens"].append({**described["added_tokens"][0], "content": "<pad>", "id": size})
    (folder / "tokenizer.json").write_text(json.dumps(described))
    base = Llama(dataclasses.replace(tiny, vocab_size=size))
    save(base, tmp_path / "base")
    adapt(base, LoraConfig())
    write_adapter(LoraConfig(), {n: p for n, p in base.named_parameters() if p.requires_grad}, folder,
                  tmp_path / "base", {})  # fmt: skip
    assert len(load_tokenizer(folder)) == size
    older = shutil.copytree(folder, tmp_path / "older")  # as in 2023: the model file, and what was added to it
    (older / "tokenizer.json").unlink()
    (older / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    assert len(load_tokenizer(older)) == size
    shutil.rmtree(tmp_path / "base")
    assert len(load_tokenizer(folder)) == size + 1  # nothing is known of rows


def test_several_adapters_on_one_base(tiny: LlamaConfig, tmp_path: Path) -> None:
    """Each prompt by its own adapter in one call, equal to each alone."""
    from camelid import Engine, SamplingParams

    torch.manual_seed(0)
    save(Llama(tiny), tmp_path / "base")
    for number, name in enumerate(("a", "b")):
        config = LoraConfig(r=2 + number)
        tuned = moved(load(tmp_path / "base"), config, seed=number)
        (tmp_path / name).mkdir()
        write_adapter(config, {n: p for n, p in tuned.named_parameters() if p.requires_grad}, tmp_path / name,
                      tmp_path / "base", {})  # fmt: skip
    model = load_adapters(tmp_path / "base", {"a": tmp_path / "a", "b": tmp_path / "b"})
    prompt = [5, 6, 7]
    each = [SamplingParams(max_new_tokens=8, ignore_eos=True, adapter=name) for name in ("a", "b", "a")]
    together = Engine(model).generate([prompt] * 3, each)
    alone = [Engine(load(tmp_path / n)).generate([prompt], SamplingParams(max_new_tokens=8, ignore_eos=True))[0]
             for n in ("a", "b", "a")]  # fmt: skip
    assert [r.ids for r in together] == [r.ids for r in alone]
    assert together[0].ids != together[1].ids
    plain = Engine(load(tmp_path / "base")).generate([prompt], SamplingParams(max_new_tokens=8, ignore_eos=True))
    none = SamplingParams(max_new_tokens=8, ignore_eos=True)
    use_adapter(model, None)
    assert [r.ids for r in Engine(model).generate([prompt, prompt], [each[0], none])] == [together[0].ids, plain[0].ids]
    use_adapter(model, None)
    engine = Engine(model)
    engine.generate([prompt], each[:1])
    assert engine.generate([prompt], none)[0].ids == plain[0].ids  # the request before leaves nothing behind
    with pytest.raises(InputError, match=r"no adapter named 'c' \(it has a, b\)"):
        Engine(model).generate([prompt], SamplingParams(adapter="c"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"target_modules": 7}, "target_modules"),
        ({"target_modules": ["lm_head"]}, "lm_head"),
        ({"r": "8"}, "r '8'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"something_new": 1}, "something_new"),
        ({"base_model_name_or_path": "../a"}, "is an adapter, not a model"),
        ({"base_model_name_or_path": None}, "does not say what it belongs to"),
        ({"base_model_name_or_path": "./gone/away"}, "'./gone/away' is not here"),
    ],
)
def test_adapters_that_cannot_be_opened(
    tiny: LlamaConfig, tmp_path: Path, change: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a base is looked for here first
    save(Llama(tiny), tmp_path / "base")
    tuned = load(tmp_path / "base")
    adapt(tuned, LoraConfig())
    (tmp_path / "a").mkdir()
    write_adapter(LoraConfig(), {n: p for n, p in tuned.named_parameters() if p.requires_grad}, tmp_path / "a",
                  tmp_path / "base", {})  # fmt: skip
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=why):
        load(tmp_path / "a")


def test_an_adapter_for_another_base(tiny: LlamaConfig, tmp_path: Path) -> None:
    model = Llama(tiny)
    adapt(model, LoraConfig())
    tensors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    write_adapter(LoraConfig(), tensors, tmp_path, tmp_path, {})
    other = Llama(dataclasses.replace(tiny, hidden_size=64, head_dim=16))
    with pytest.raises(FormatError, match=r"this base needs .* the adapter belongs to another base"):
        attach(other, tmp_path)


def test_an_adapter_on_a_quantised_base_learns_as_on_the_rounded_weights(model: Llama) -> None:
    rounded = copy.deepcopy(model)
    quantize_layers(model, 4, 16, symmetric=False, rounds_inputs=False)
    for name, module in model.named_modules():
        if hasattr(module, "dense"):
            rounded.get_submodule(name).weight.data.copy_(module.dense())
    x = ids(model.config)
    for m in (model, rounded):
        moved(m, LoraConfig(r=4))
        m(x).logits.square().mean().backward()
    learned = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    expected = {n: p.grad for n, p in rounded.named_parameters() if p.requires_grad}
    assert learned.keys() == expected.keys()
    for name, gradient in learned.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="do not divide"):
        quantize_layers(Llama(model.config), 4, 9, symmetric=False, rounds_inputs=False)


@pytest.mark.parametrize("below", ["bfloat16", "bytes"])
def test_a_layer_in_bfloat16_has_the_gradients_of_float64(below: str) -> None:
    """Over enough tokens for the native products where they are: to what rounding leaves."""
    drawn = torch.Generator().manual_seed(0)
    x, slope = (torch.randn(3, 25, n, generator=drawn).to(torch.bfloat16) for n in (96, 80))
    weight, a, b = (torch.randn(*shape, generator=drawn) / 10 for shape in ((80, 96), (4, 96), (80, 4)))
    config, found = LoraConfig(r=4, lora_alpha=12.0), []
    for dtype in (torch.float64, torch.bfloat16):
        base = torch.nn.Linear(96, 80, bias=False).requires_grad_(False).to(dtype)
        base.weight.copy_(weight)
        layer = AdaptedLinear(quantized(base, 8, None, True, False) if below == "bytes" else base)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        layer.adapters["default"] = lora = Lora(base, config, wide, torch.Generator().manual_seed(1))
        layer.active = "default"
        lora.lora_A.data.copy_(a)
        lora.lora_B.data.copy_(b)
        given = x.detach().to(dtype).requires_grad_()
        out = layer(given)
        out.backward(slope.to(dtype))
        assert [lora.lora_A.grad.dtype, lora.lora_B.grad.dtype, given.grad.dtype] == [wide, wide, dtype]
        found.append([t.double() for t in (out, given.grad, lora.lora_A.grad, lora.lora_B.grad)])
    for wanted, near in zip(*found, strict=True):
        assert 0 < float((near - wanted).norm() / wanted.norm()) < 2e-2
