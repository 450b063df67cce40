"""What every reader returns: a config and named tensors, under the names that `Llama.state_dict()` uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

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
