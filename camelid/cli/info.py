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
        for name, value in result.items():
            print(f"{name:<12} {value}")
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

    checkpoint = open_model(source)
    config = checkpoint.config
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "parameters": config.num_parameters(),
        "config": config.to_dict(),
        "generation": checkpoint.generation,
    }
