"""What every reader returns: a config and named tensors, under the names that `Llama.state_dict()` uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from camelid.errors import FormatError
from camelid.model.config import LlamaConfig
from camelid.model.quantized import Integers


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, opened but not read.

    `tensors()` yields (name, tensor) once each, in the file's dtype (quantised GGUF: float32; quantised layers of a
    Hugging Face folder: as integers). `generation` is `generation_config.json` or its equivalent. `quantized` names the
    type of weights that were rounded, if any.
    """

    path: Path
    format: str
    config: LlamaConfig
    tensors: Callable[[], Iterator[tuple[str, Tensor | Integers]]]
    generation: dict[str, Any] = field(default_factory=dict)
    quantized: str | None = None


def put_together(
    tensors: Iterator[tuple[str, Tensor]], parts: Sequence[str], needed: Sequence[str],
    make: Callable[[Mapping[str, Tensor], str], Integers], path: Path,
) -> Iterator[tuple[str, Tensor | Integers]]:  # fmt: skip
    """Tensors as they are, but those called LAYER.PART with a part among `parts`: when a layer has all that is
    `needed`, what `make` makes of them, as LAYER.weight. Raises FormatError naming what is missing."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        layer, _, part = name.rpartition(".")
        if part not in parts:
            yield name, tensor
            continue
        found = waiting.setdefault(layer, {})
        found[part] = tensor
        if all(p in found for p in needed):
            yield f"{layer}.weight", make(waiting.pop(layer), f"{path}: {layer}")
    for layer, found in waiting.items():
        missing = next(p for p in needed if p not in found)
        raise FormatError(f"{path}: tensor {layer}.{missing} is missing")
