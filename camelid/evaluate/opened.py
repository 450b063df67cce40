"""A model opened to be measured: what protocols say of it, and what no score is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from camelid.artifact import MANIFEST
from camelid.corpus.decontaminate import unchecked
from camelid.corpus.read import find_files
from camelid.errors import CamelidError
from camelid.formats.hf import dtype_named
from camelid.formats.load import load, load_tokenizer, resolve
from camelid.kernels.device import best_device
from camelid.kernels.precision import native_dtype
from camelid.model.llama import Llama
from camelid.model.quantized import QuantizedLinear
from camelid.tokenizer.tokenizer import Tokenizer


def open_for(source: str, dtype: str, data: str | None) -> tuple[Llama, Tokenizer, str | None]:
    """MODEL on the GPU if there is one, its tokenizer, and a warning when its corpora were not kept clear of `data`.
    `auto` is bfloat16 where the processor multiplies it."""
    device = best_device()
    wanted = native_dtype(device) if dtype == "auto" else dtype_named(dtype)
    warning = None
    if data is not None and not (Path(data) / MANIFEST).exists():
        warning = unchecked(resolve(source), find_files([data]))
    model: Llama = load(source, dtype=wanted, device=device)
    return model, load_tokenizer(source), warning


def measured_in(model: Llama, tokenizer: Tokenizer) -> str:
    """The end of every protocol: the model's dtype, how quantised layers are multiplied, and its tokenizer."""
    packed = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    rounds = model.device.type == "cpu" and any(layer.rounds_inputs for layer in packed)
    layers = ""
    if packed:
        bits = " and ".join(f"int{n}" for n in sorted({layer.bits for layer in packed}))
        layers = f" with {bits} layers, whose inputs are {'rounded to int8' if rounds else 'not rounded'}"
    return f"{str(model.dtype).removeprefix('torch.')}{layers}, tokenizer {tokenizer.digest()[:12]}"


def check_finite(log_likelihoods: Iterable[float], what: str) -> None:
    """Raise CamelidError where a model gives `what` no probability: NaN is never a score."""
    if not all(map(math.isfinite, log_likelihoods)):
        raise CamelidError(f"the model gives {what} no probability (NaN or infinity): its weights are broken")
