"""A model opened to be measured."""

from __future__ import annotations

from pathlib import Path

import torch

from camelid.artifact import MANIFEST
from camelid.corpus.decontaminate import unchecked
from camelid.corpus.read import find_files
from camelid.formats.hf import dtype_named
from camelid.formats.load import load, load_tokenizer, resolve
from camelid.kernels.precision import native_dtype
from camelid.model.llama import Llama
from camelid.tokenizer.tokenizer import Tokenizer


def open_for(source: str, dtype: str, data: str | None) -> tuple[Llama, Tokenizer, str | None]:
    """MODEL on the GPU if there is one, its tokenizer, and a warning when its corpora were not kept clear of `data`.
    `auto` is bfloat16 where the processor multiplies it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = native_dtype(device) if dtype == "auto" else dtype_named(dtype)
    warning = None
    if data is not None and not (Path(data) / MANIFEST).exists():
        warning = unchecked(resolve(source), find_files([data]))
    model: Llama = load(source, dtype=wanted, device=device)
    return model, load_tokenizer(source), warning
