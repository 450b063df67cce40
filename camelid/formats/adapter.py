"""Adapters as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors; and what base they need.

A folder made here also says, in its manifest, which base it was trained on (a fingerprint of its weights): on another
base an adapter gives fluent nonsense, so it is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camelid.artifact import MANIFEST, read_manifest
from camelid.disk import read_json
from camelid.errors import FormatError, InputError
from camelid.formats.hub import is_hub_id, snapshot
from camelid.formats.pickle_reader import Archive
from camelid.formats.safetensors_file import OpenFile, write_safetensors
from camelid.model.llama import Llama
from camelid.model.lora import LoraConfig, adapt, targets

CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model."
SUFFIXES = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "lora_magnitude_vector": ".lora_magnitude_vector"}
# What says nothing about the computation, or is read below. Any other field that is set might change it: refused.
READ = {
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora",
    "lora_dropout", "inference_mode", "revision", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size",
    "runtime_config", "ensure_weight_tying", "init_lora_weights", "layers_pattern", "loftq_config", "eva_config",
}  # fmt: skip
UNUSED: tuple[Any, ...] = (None, False, "none", [], {})
# How an adapter began; the others (pissa, olora, loftq, …) also change the base's weights.
BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, not a whole model. Some trainers put the base's config.json beside one."""
    return (
        (folder / CONFIG).exists()
        and not any(folder.glob("model*.safetensors*"))
        and not any(folder.glob("pytorch_model*.bin*"))
    )


def read_config(folder: Path) -> tuple[LoraConfig, str]:
    """An adapter's config, and the base model it names. Raises InputError naming the field that is not supported."""
    path = folder / CONFIG
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise FormatError(f"{path}: peft_type is {raw.get('peft_type')!r}; camelid reads LORA adapters")
    for name, value in raw.items():
        if (name not in READ and value not in UNUSED) or (name == "init_lora_weights" and value not in BEGINNINGS):
            raise FormatError(f"{path}: {name} is {value!r}, which camelid does not implement")
    named = raw.get("target_modules")
    if named == "all-linear":
        named = list(LoraConfig().target_modules)
    elif isinstance(named, str):  # a pattern: which layers it meant, the file says
        named = sorted({_place(folder, name)[0].rpartition(".")[2] for name in _names(folder)})
    if not isinstance(named, list) or not all(isinstance(n, str) for n in named):
        raise FormatError(f"{path}: target_modules is {named!r}, not a list of layer names")
    rank, alpha, base = raw.get("r"), raw.get("lora_alpha"), raw.get("base_model_name_or_path")
    if not isinstance(rank, int) or isinstance(rank, bool) or not isinstance(alpha, int | float):
        raise FormatError(f"{path}: r {rank!r} and lora_alpha {alpha!r} must be numbers")
    if not isinstance(base, str) or not base:
        raise FormatError(f"{path}: base_model_name_or_path is missing: the adapter does not say what it belongs to")
    order = {name: n for n, name in enumerate(LoraConfig().target_modules)}
    flags = bool(raw.get("use_rslora")), bool(raw.get("use_dora"))
    return LoraConfig(rank, float(alpha), tuple(sorted(named, key=lambda n: order.get(n, 99))), *flags), base


def base_of(folder: Path, here: bool = False) -> Path:
    """The base model that an adapter names: a path as it is, or beside the adapter, or a hub id, which is fetched
    unless only what is `here` counts. Raises InputError without one."""
    named = read_config(folder)[1]
    for path in (Path(named), folder / named):
        if path.exists():
            if path.is_dir() and is_adapter(path):
                raise FormatError(f"{folder / CONFIG}: base_model_name_or_path {named!r} is an adapter, not a model")
            return path
    # A folder that was renamed is no model of somebody's on the hub.
    moved = any(place.parent.is_dir() for place in (Path(named), folder / named))
    if is_hub_id(named) and not moved:
        revision = read_json(folder / CONFIG).get("revision")
        return snapshot(f"{named}@{revision}" if isinstance(revision, str) and revision else named, here)
    raise InputError(
        f"{folder / CONFIG}: the base model {named!r} is not here: put it back, or write its place into "
        "base_model_name_or_path"
    )


def read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter's config, and its tensors under the names they have in a model whose adapter is "default"."""
    config, _ = read_config(folder)
    tensors: dict[str, Tensor] = {}
    for name, read in _names(folder).items():
        layer, kind = _place(folder, name)
        tensors[f"{layer}.adapters.default.{kind}"] = read()
    return config, tensors


def _names(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """An adapter's tensors, each read when it is called for; of a folder of 2023, from its .bin file."""
    path, older = folder / ADAPTER, folder / "adapter_model.bin"
    if path.is_file():
        return {name: stored.dense for name, stored in OpenFile().tensors(path)}
    if not older.is_file():
        raise FormatError(f"{path} is missing: the download is incomplete")
    archive = Archive(older)
    return {name: partial(archive.read, name) for name in archive.tensors}


def _place(folder: Path, name: str) -> tuple[str, str]:
    """The layer that a tensor is of, and what it is of its adapter."""
    kind = next((k for k, suffix in SUFFIXES.items() if name.endswith(suffix)), None)
    if kind is None or not name.startswith(PREFIX):
        raise FormatError(f"{folder}: tensor {name!r} is no part of a LoRA on a LLaMA's blocks")
    return name[len(PREFIX) : -len(SUFFIXES[kind])], kind


def attach(model: Llama, folder: Path, name: str = "default", fingerprint: str | None = None) -> None:
    """Put the adapter of a folder on a model, under a name, and make it active. `fingerprint` is the base's.

    Raises FormatError when it was made for another base: by its fingerprint, names or shapes.
    """
    made_for = read_manifest(folder).get("base_fingerprint") if (folder / MANIFEST).exists() else None
    if made_for and fingerprint and made_for != fingerprint:
        raise FormatError(
            f"{folder}: the adapter was trained on another base: its manifest has {made_for}, these weights are "
            f"{fingerprint}. Put the right model at base_model_name_or_path in {CONFIG}"
        )
    config, tensors = read_adapter(folder)
    adapt(model, config, name)
    for layer, parent, leaf in targets(model, config):
        lora = getattr(parent, leaf).adapters[name]
        for kind, parameter in lora.named_parameters():
            tensor = tensors.pop(f"{layer}.adapters.default.{kind}", None)
            if tensor is None or tensor.shape != parameter.shape:
                found = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
                raise FormatError(
                    f"{folder}: {kind} of {layer} {found}, this base needs {list(parameter.shape)}: the "
                    "adapter belongs to another base, or its target_modules means some layers only, which is not read"
                )
            parameter.data.copy_(tensor)
    if tensors:
        raise FormatError(f"{folder}: {min(tensors)} stands on no layer of this base: it belongs to another")
    model.requires_grad_(False)


def write_adapter(
    config: LoraConfig, tensors: Mapping[str, Tensor], out: Path, base: Path, generation: Mapping[str, Any]
) -> dict[str, str]:
    """adapter_config.json, adapter_model.safetensors and generation_config.json into the existing folder `out`.
    `tensors` go by the model's own names. Returns the SHA-256 of the weights file."""
    renamed = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        renamed[f"{PREFIX}{layer.partition('.adapters.')[0]}{SUFFIXES[kind]}"] = tensor
    described = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base.resolve()),
        "r": config.r, "lora_alpha": config.lora_alpha, "target_modules": list(config.target_modules),
        "use_rslora": config.use_rslora, "use_dora": config.use_dora, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "modules_to_save": None,
    }  # fmt: skip
    (out / CONFIG).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    (out / "generation_config.json").write_text(json.dumps(dict(generation), indent=1) + "\n", encoding="utf-8")
    return {ADAPTER: write_safetensors(out / ADAPTER, renamed, {"format": "pt"})}


class Fingerprint:
    """What tells one model's weights from another's: names, shapes and a thousand or two of the numbers of every
    tensor."""

    def __init__(self) -> None:
        self._parts: dict[str, bytes] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        flat = tensor.flatten()
        sample = flat[:: max(1, len(flat) // 1000)].to(torch.float32).contiguous()
        text = f"{name} {list(tensor.shape)} ".encode()
        self._parts[name] = hashlib.blake2b(text + sample.numpy().tobytes(), digest_size=16).digest()

    def hex(self) -> str:
        whole = b"".join(self._parts[name] for name in sorted(self._parts))
        return hashlib.blake2b(whole, digest_size=12).hexdigest()
