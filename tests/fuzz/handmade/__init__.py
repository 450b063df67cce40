"""Hostile models made by hand, by kind: what past advisories of loaders name. Each is a change to a sound model in a
folder (test_loaders.py makes them), and each must be refused."""

from __future__ import annotations

from collections.abc import Callable

from .changes import Cases
from .config import config_cases
from .gguf import gguf_cases
from .pth import pth_cases
from .safetensors import safetensors_cases
from .tokenizer import tokenizer_cases

CASES: dict[str, Callable[[], Cases]] = {
    "config": config_cases,
    "safetensors": safetensors_cases,
    "gguf": gguf_cases,
    "pth": pth_cases,
    "tokenizer": tokenizer_cases,
}
