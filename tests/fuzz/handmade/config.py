"""config.json, generation_config.json, and an index of shards."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from .changes import (
    GONE,
    INF,
    LARGE,
    NAN,
    Cases,
    edited,
    field,
    not_json,
)


def config_cases() -> Cases:
    name = "config.json"
    yield from not_json(name)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        yield from field(name, key, GONE, None, 0, -1, 3, 2.5, "64", True, [], {}, LARGE, 10**9, NAN)
    yield from field(name, "num_key_value_heads", 0, -1, 3, 2.5, "1", [], LARGE)
    yield from field(name, "head_dim", -2, 1, 7, 2.5, "16", [], LARGE, 32)
    yield from field(name, "max_position_embeddings", None, 0, -1, 2.5, "2048", [], LARGE, NAN)
    yield from field(name, "rms_norm_eps", 0, -1e-6, NAN, INF, "1e-6", True, [])
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        yield from field(name, key, "false", 1, None, [])
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        yield from field(name, key, 2.5, "1", True, {}, LARGE)
    yield from field(name, "eos_token_id", [1, "2"], [[1]], [-1])
    yield from field(name, "model_type", "mistral", "", None, 7, ["llama"])
    yield from field(name, "architectures", ["MistralForCausalLM"], "LlamaForCausalLM", [7], {"a": 1}, [[]])
    yield from field(name, "hidden_act", "gelu", None, 7, ["silu"])
    yield from field(name, "attention_bias", True)  # the file has no biases
    rope = ("rope_parameters",)
    yield from field(name, "rope_theta", 0, -1, NAN, INF, "10000", True, [], inside=rope)
    yield from field(name, "rope_type", "longrope", "x" * 9999, 7, [], {}, inside=rope)
    for kind in ("linear", "dynamic", "llama3", "yarn"):
        yield from field(name, "rope_parameters", {"rope_type": kind})  # without a factor
        for factor in (0, -1, NAN, INF, "8", None, []):
            values = {"rope_type": kind, "factor": factor, "low_freq_factor": 1, "high_freq_factor": 4,
                      "original_max_position_embeddings": 64}  # fmt: skip
            yield f"{name}: {kind} factor {factor!r}", partial(edited, name, rope, values)
    yield from field(name, "rope_parameters", "linear", [1], 7)
    yield from field(name, "quantization_config", "int8", [1], {"quant_method": "bitsandbytes"}, {"quant_method": None},
                     {"quant_method": "fp8"}, {"quant_method": "compressed-tensors"}, {"quant_method": "gptq"},
                     {"quant_method": "awq", "bits": 3, "group_size": 64}, {"quant_method": ["gptq"]})  # fmt: skip
    yield from not_json("generation_config.json")
    yield from field("generation_config.json", "eos_token_id", "2", -1, 2.5, [1, "2"], [[1]], {"a": 1}, True)
    index = "model.safetensors.index.json"
    yield from not_json(index)
    yield from field(index, "weight_map", GONE, None, [], {}, "model.safetensors", 7)
    outside = ("../m/config.json", "/etc/passwd", "..", ".", "", "a/../../x", "x\0y", "n" * 300, "nowhere.safetensors",
               7, None, ["model.safetensors"], "config.json")  # fmt: skip
    for target in outside:
        yield f"{index}: a shard {target!r:.30}", partial(edited, index, ("weight_map", "model.norm.weight"), target)
    yield "a shard that is a folder", _shard_folder
    yield "a shard that is a link out of the folder", _shard_link
    yield "a shard that is a link to itself", _shard_loop
    yield "a shard that is a pipe", _shard_pipe
    yield "a shard twice", _shard_twice


def _first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def _shard_folder(folder: Path) -> None:
    shard = _first_shard(folder)
    shard.unlink()
    shard.mkdir()


def _shard_link(folder: Path) -> None:
    shard = _first_shard(folder)
    shard.rename(folder.parent / "elsewhere.safetensors")
    shard.symlink_to(folder.parent / "elsewhere.safetensors")


def _shard_loop(folder: Path) -> None:
    shard = _first_shard(folder)
    shard.unlink()
    shard.symlink_to(shard.name)


def _shard_pipe(folder: Path) -> None:
    shard = _first_shard(folder)
    shard.unlink()
    os.mkfifo(shard)


def _shard_twice(folder: Path) -> None:
    shard = _first_shard(folder)
    (folder / "more.safetensors").write_bytes(shard.read_bytes())
    edited("model.safetensors.index.json", ("weight_map", "more"), "more.safetensors", folder)
