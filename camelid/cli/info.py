"""This machine, the versions that decide the numbers, and what camelid will use; with MODEL, the model's shape."""

from __future__ import annotations

import argparse
from typing import Any

from camelid.cli import settings


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?")
    settings.example(parser, "camelid info runs/small")


def run(options: argparse.Namespace) -> dict[str, Any]:
    result = _model(options.model) if options.model else _machine()
    if not options.json:
        shown = _shown(result) if options.model else result
        width = max(map(len, shown))
        for name, value in shown.items():
            print(f"{name:<{width}} {value}")
    return result


def _machine() -> dict[str, Any]:
    import platform

    import torch

    from camelid.artifact import versions
    from camelid.kernels.decoder import level
    from camelid.kernels.library import describe
    from camelid.kernels.threads import cores

    cuda = torch.cuda.is_available()
    on_cpu = f"native, {level()}" if level() else "torch"
    return {
        **versions(),
        "system": platform.platform(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "training": "bfloat16" if cuda or torch.cpu._is_avx512_bf16_supported() else "float32",
        "kernels": f"torch; for text the {describe()}",
        "generation": ("torch on a GPU that holds the model, else " if cuda else "") + on_cpu,
    }


def _model(source: str) -> dict[str, Any]:
    from camelid.formats import open_model
    from camelid.formats.convert import size_of
    from camelid.generate.place import bytes_as_it_is, bytes_to_run
    from camelid.kernels.memory import installed

    checkpoint = open_model(source)
    config, dtype = checkpoint.config, checkpoint.tensors()["embed_tokens.weight"].dtype
    forms = {str(dtype).removeprefix("torch."): None, "int8": 8, "int4": 4}
    takes = {name: bytes_to_run(config, dtype.itemsize, bits) for name, bits in forms.items()}
    if checkpoint.quantized:
        takes = {"as it is": bytes_as_it_is(checkpoint)} | ({} if checkpoint.format == "hf" else takes)
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "quantized": checkpoint.quantized,
        "parameters": config.num_parameters(),
        "bytes": size_of(checkpoint.path),
        "bytes_to_run": takes,
        "cache_bytes_per_token": 4 * config.num_hidden_layers * config.kv_heads * config.head_size,
        "memory": installed(),
        "config": config.to_dict(),
        "generation": checkpoint.generation,
    }


def _shown(found: dict[str, Any]) -> dict[str, Any]:
    """For people: sizes in units, and one line for each field of the config that is set."""
    runs = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in found["bytes_to_run"].items())
    kind = f", {found['quantized']}" if found["quantized"] else ""
    config = {name: value for name, value in found["config"].items() if value is not None}
    return {
        "path": found["path"],
        "format": found["format"] + kind,
        "parameters": f"{found['parameters']:,}",
        "on disk": f"{found['bytes'] / 1e9:.2f} GB",
        "to run": f"{runs}; this machine has {found['memory'] / 1e9:.1f} GB",
        "cache": f"{found['cache_bytes_per_token'] / 1e3:.1f} kB a token in bfloat16",
        **config,
        **found["generation"],
    }
