"""What every reader returns, and every writer takes: a config and named tensors, under the names that
`Llama.state_dict()` uses, each read when it is asked for. So a model is converted a tensor at a time, however large."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camelid.errors import FormatError
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.quantized import Integers


@dataclass(frozen=True)
class Stored:
    """A tensor on disk. `read()` gives it in `dtype`, or a quantised layer as integers; `shape` and `dtype` are those
    of the weight that it means (integers: float32). `integers()`, of a matrix that `read()` expands, gives those too,
    of `integer_bytes`: the file's own where they are of our kind, else rounded to int8 by groups of 32. Raises
    FormatError when the file does not hold what it declares."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor | Integers]
    integers: Callable[[], Integers] | None = None
    integer_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the weight in `dtype`."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def dense(self) -> Tensor:
        """The weight, in `dtype`."""
        found = self.read()
        return found.dense(self.dtype) if isinstance(found, Integers) else found.to(self.dtype)


def dense(tensor: Tensor | Stored) -> Tensor:
    """A tensor that is at hand, or on disk."""
    return tensor.dense() if isinstance(tensor, Stored) else tensor.detach()


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, opened but not read.

    `tensors()` has each once, in the files' dtype (quantised GGUF: float32; quantised layers of a Hugging Face folder,
    which come last: as integers). `generation` is `generation_config.json` or its equivalent. `quantized`
    names the type of weights that were rounded, if any.
    """

    path: Path
    format: str
    config: LlamaConfig
    tensors: Callable[[], dict[str, Stored]]
    generation: dict[str, Any] = field(default_factory=dict)
    quantized: str | None = None


def named_weights(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Every weight of a model under its own names and in its own order, in one dtype: the embedding's, or float32 where
    weights were rounded. A tied lm_head is there once, as the embedding. No other weight is read.

    Raises FormatError naming the tensor that is missing, is none of this model's, or has another shape.
    """
    with torch.device("meta"):
        model = Llama(checkpoint.config)
    found = checkpoint.tensors()
    drop_tied_head(checkpoint, found)
    weights: dict[str, Stored] = {}
    for name, parameter in model.named_parameters():
        if name not in found:
            raise FormatError(f"{checkpoint.path}: tensor {name!r} is missing")
        weights[name] = found.pop(name)
        check_shape(checkpoint.path, name, weights[name].shape, tuple(parameter.shape))
        check_kind(checkpoint.path, name, weights[name].dtype)
    if found:
        raise strange(checkpoint.path, min(found))
    dtype = torch.float32 if checkpoint.quantized else weights["embed_tokens.weight"].dtype
    return {
        name: replace(weight, dtype=dtype, read=partial(_as_declared, checkpoint.path, name, weight))
        for name, weight in weights.items()
    }


def drop_tied_head(checkpoint: Checkpoint, tensors: dict[str, Stored]) -> None:
    """Take an lm_head out that the config says is the embedding. Raises FormatError when it is another: some programs
    would use it, and others not."""
    if not checkpoint.config.tie_word_embeddings or "lm_head.weight" not in tensors:
        return
    head, embedding = tensors.pop("lm_head.weight"), tensors.get("embed_tokens.weight")
    if embedding is None or head.shape != embedding.shape:
        return  # told by its own check
    own, shared = head.read(), embedding.read()
    if isinstance(own, Tensor) and isinstance(shared, Tensor) and not torch.equal(own, shared):
        raise FormatError(
            f"{checkpoint.path}: tie_word_embeddings is true, but lm_head.weight is not the embedding: set it to false "
            "to use both, or take lm_head.weight out of the file"
        )


def _as_declared(path: Path, name: str, weight: Stored) -> Tensor | Integers:
    """What is read has the shape that the file's header said: a writer has already written that down."""
    found = weight.read()
    check_shape(path, name, found.shape, weight.shape)
    return found


def strange(path: Path, name: str) -> FormatError:
    """The refusal of a tensor that no model of this shape has."""
    return FormatError(f"{path}: tensor {name!r} does not belong to the LLaMA that its config describes")


def check_kind(path: Path, name: str, dtype: torch.dtype) -> None:
    """Raises FormatError for a weight that is no floating-point number: nothing says what it means."""
    if not dtype.is_floating_point:
        raise FormatError(
            f"{path}: tensor {name!r} holds {str(dtype).removeprefix('torch.')}, not floating-point numbers"
        )


def check_shape(path: Path, name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    """Raises FormatError when a tensor's shape is not what the config makes it."""
    if tuple(shape) != tuple(expected):
        raise FormatError(f"{path}: tensor {name!r} has shape {list(shape)}, the config says {list(expected)}")


def put_together(
    tensors: Mapping[str, Stored], parts: Sequence[str], needed: Sequence[str],
    shape_of: Callable[[Mapping[str, Stored], str], tuple[int, int]],
    make: Callable[[Mapping[str, Tensor], str], Integers], path: Path,
) -> dict[str, Stored]:  # fmt: skip
    """Tensors as they are, but those called LAYER.PART with a part among `parts`: as LAYER.weight, which `make` makes
    of them. Raises FormatError naming what is missing of what is `needed`."""
    together: dict[str, Stored] = {}
    layers: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part in parts:
            layers.setdefault(layer, {})[part] = tensor
        else:
            together[name] = tensor
    for layer, found in layers.items():
        what = f"{path}: {layer}"
        missing = next((p for p in needed if p not in found), None)
        if missing is not None:
            raise FormatError(f"{path}: tensor {layer}.{missing} is missing")
        if f"{layer}.weight" in together:
            raise FormatError(f"{path}: {layer} is there twice, as integers and as weights: which is meant?")
        together[f"{layer}.weight"] = Stored(shape_of(found, what), torch.float32, partial(_made, found, make, what))
    return together


def _made(found: Mapping[str, Stored], make: Callable[[Mapping[str, Tensor], str], Integers], what: str) -> Integers:
    return make({part: tensor.dense() for part, tensor in found.items()}, what)
