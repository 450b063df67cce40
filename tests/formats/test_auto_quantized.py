"""AutoGPTQ's and AutoAWQ's folders, written here number by number from their formats' description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from camelid.errors import FormatError, InputError
from camelid.formats.hf import save
from camelid.formats.load import load, open_model
from camelid.generate.native import NativeRunner
from camelid.generate.runner import Chunk
from camelid.kernels.library import library
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.quantized import QuantizedLinear, quantize_head

CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
FORMS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False},
    "gptq 8 bits": {"quant_method": "gptq", "bits": 8, "group_size": 64, "desc_act": False},
    "gptq rows": {"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
}


def words(values: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:
    """int32 [rows, columns * bits / 32]: of each word value i is column order[i] of its stretch, from the low bits
    on."""
    together = 32 // bits
    rows = []
    for row in values.tolist():
        made = []
        for at in range(0, len(row), together):
            word = sum(row[at + order[i]] << (bits * i) for i in range(together))
            made.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(made)
    return torch.tensor(rows, dtype=torch.int32)


def parts(form: dict[str, Any], rows: int, columns: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """A layer's tensors, and the weight [rows, columns] that they mean, in float64."""
    generator = torch.Generator().manual_seed(seed)
    bits, group = form["bits"], form["group_size"] if form["group_size"] > 0 else columns
    q = torch.randint(0, 2**bits, (columns, rows), generator=generator)
    zero = torch.randint(1, 2**bits, (columns // group, rows), generator=generator)
    scales = (torch.rand(columns // group, rows, generator=generator) * 0.02 + 0.01).half()
    meant = (q - zero.repeat_interleave(group, 0)).double() * scales.double().repeat_interleave(group, 0)
    if form["quant_method"] == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {"qweight": words(q, 4, order), "qzeros": words(zero, 4, order), "scales": scales}, meant.T
    plain = tuple(range(8))
    stored = zero - (0 if form.get("checkpoint_format") == "gptq_v2" else 1)
    return {
        "qweight": words(q.T, bits, plain).T.contiguous(), "qzeros": words(stored, bits, plain), "scales": scales,
        "g_idx": (torch.arange(columns) // group).int(), "bias": torch.zeros(rows, dtype=torch.float16),
    }, meant.T  # fmt: skip


def folder(form: dict[str, Any], where: Path) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(0)
    save(Llama(CONFIG), where)
    path = where / "model.safetensors"
    tensors, meant = load_file(path), {}
    for seed, name in enumerate([n for n in tensors if n.endswith("_proj.weight")]):
        made, weight = parts(form, *tensors.pop(name).shape, seed)
        layer = name.removesuffix(".weight")
        tensors |= {f"{layer}.{part}": tensor for part, tensor in made.items()}
        meant[layer.removeprefix("model.")] = weight
    save_file(tensors, path)
    config = json.loads((where / "config.json").read_text()) | {"quantization_config": form}
    (where / "config.json").write_text(json.dumps(config))
    return where, meant


@pytest.mark.parametrize("name", FORMS)
def test_the_weights_are_what_the_file_means(name: str, tmp_path: Path) -> None:
    where, meant = folder(FORMS[name], tmp_path / "model")
    model: Llama = load(where, dtype=torch.float32)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert layers.keys() == meant.keys()
    for layer, weight in meant.items():
        assert torch.equal(layers[layer].dense().double(), weight), layer
    assert open_model(where).quantized


@pytest.mark.skipif(library() is None, reason="the native library is not built")
@pytest.mark.parametrize("name", FORMS)
def test_the_decoder_runs_them(name: str, tmp_path: Path) -> None:
    model: Llama = load(folder(FORMS[name], tmp_path / "model")[0], dtype=torch.float32)
    quantize_head(model)
    ids = torch.randint(0, 96, (40,)).tolist()
    native = NativeRunner(model, cache=torch.float32)
    native.reserve(2)
    [found] = native.run([Chunk(ids, 0, [0, 1], 40)])
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    assert (found - expected).abs().median() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"bits": 3}, "3 bits"), ({"group_size": 0}, "group_size"), ({"group_size": 64}, "scales"),
     ({"checkpoint_format": "marlin"}, "marlin"), ({"quant_method": "awq"}, "fit"), ({"bits": 8}, "scales")],
)  # fmt: skip
def test_configs_that_do_not_fit(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    where, _ = folder(FORMS["gptq"], tmp_path / "model")
    config = json.loads((where / "config.json").read_text())
    config["quantization_config"] |= changes
    (where / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=why if why != "fit" else "scales"):
        load(where)


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_only_layers_of_blocks_are_in_whole_numbers(name: str, tmp_path: Path) -> None:
    where, _ = folder(FORMS["gptq"], tmp_path / "model")
    tensors = load_file(where / "model.safetensors")
    made, _ = parts(FORMS["gptq"], *tensors.pop(f"{name}.weight").shape, 9)
    save_file(tensors | {f"{name}.{part}": tensor for part, tensor in made.items()}, where / "model.safetensors")
    for integers in (False, True):
        with pytest.raises(FormatError, match="quantised, but it is not a linear layer of a LLaMA's blocks"):
            load(where, integers=integers)


def test_reordered_columns_and_missing_parts(tmp_path: Path) -> None:
    where, _ = folder(FORMS["gptq"], tmp_path / "model")
    path, name = where / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(path)
    save_file(tensors | {f"{name}.g_idx": tensors[f"{name}.g_idx"].flip(0).contiguous()}, path)
    with pytest.raises(InputError, match="reordered"):
        load(where)
    save_file({n: t for n, t in tensors.items() if n != f"{name}.qzeros"}, path)
    with pytest.raises(FormatError, match=r"up_proj\.qzeros is missing"):
        load(where)
