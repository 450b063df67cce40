"""camelid: the whole life of a LLaMA model. Public names are imported on first use, so `import camelid` is cheap."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "AutoModelForCausalLM": "camelid.auto",
    "AutoTokenizer": "camelid.auto",
    "LlamaConfig": "camelid.model.config",
    "Llama": "camelid.model.llama",
    "Tokenizer": "camelid.tokenizer.tokenizer",
    "Engine": "camelid.generate.engine",
    "SamplingParams": "camelid.generate.sampling",
    "load": "camelid.formats",
    "save": "camelid.formats",
    "train": "camelid.train",
    "evaluate": "camelid.evaluate",
}
__all__ = [
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "Engine",
    "Llama",
    "LlamaConfig",
    "SamplingParams",
    "Tokenizer",
    "evaluate",
    "load",
    "save",
    "train",
]

if TYPE_CHECKING:
    from camelid import evaluate, train
    from camelid.auto import AutoModelForCausalLM, AutoTokenizer
    from camelid.formats import load, save
    from camelid.generate.engine import Engine
    from camelid.generate.sampling import SamplingParams
    from camelid.model.config import LlamaConfig
    from camelid.model.llama import Llama
    from camelid.tokenizer.tokenizer import Tokenizer


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'camelid' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    return home if _HOMES[name] == f"camelid.{name}" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted(__all__)
