"""How much memory a step takes, by taking it without memory: the real forward and backward on tensors that have shapes
and no bytes, while every allocation is counted."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from camelid.child import apart
from camelid.kernels.cross_entropy import linear_cross_entropy
from camelid.model.linear import Linear, use_float8
from camelid.model.llama import Llama
from camelid.model.lora import AdaptedLinear, adapt
from camelid.model.quantized import QuantizedLinear, multiply_head_in_bytes, quantize_layers
from camelid.recipe import TrainSection
from camelid.train.context import spread_attention
from camelid.train.step import autocast


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that operators make, while they live; `there` are tensors that were there before,
    of which an operator may return a view. `peak` is the most at one time."""

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata: 0 for tensor in there}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._seen, out)
        return out

    def _seen(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self._known:
            return
        self._known[place] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, place)

    def _gone(self, place: int) -> None:
        self.now -= self._known.pop(place)


def step_memory(
    real: Llama, rows: int, micro_batches: int, settings: TrainSection, device: torch.device, context: int = 1
) -> int:
    """The most bytes that forward and backward of `rows` hold at one time, gradients included, weights not, on one of
    the `context` ranks that share each row."""
    rehearsed = partial(_rehearsed, real, rows, micro_batches, settings, device, context)
    # Tensors without bytes need torch's compiler, 80 MiB, which else only checkpointed layers and a GPU's do.
    loaded = device.type != "cpu" or real.activation_checkpointing or "torch._dynamo" in sys.modules
    return rehearsed() if loaded else apart(rehearsed)


def _rehearsed(
    real: Llama, rows: int, micro_batches: int, settings: TrainSection, device: torch.device, context: int
) -> int:
    length = settings.sequence_length // context
    with FakeTensorMode(), device:
        model = twin(real)
        if context > 1:
            spread_attention(model, context, None)
        with Live([*model.parameters(), *model.buffers()]) as live:
            for _ in range(min(micro_batches, 2)):  # the second meets the first one's gradients
                ids = torch.zeros(rows, length, dtype=torch.int64)
                with autocast(device, settings.dtype):
                    states = model.hidden(ids).flatten(0, 1)
                    loss = linear_cross_entropy(states, model.head, ids.flatten(), settings.z_loss)
                loss.backward()  # type: ignore[no-untyped-call]
                del states, loss
        return int(live.peak)


def twin(real: Llama) -> Llama:
    """A model of the same shape, dtypes, adapters and quantisation, on the current device."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(real.dtype)
    try:
        model = Llama(real.config)
    finally:
        torch.set_default_dtype(usual)
    model.activation_checkpointing = real.activation_checkpointing
    if any(isinstance(m, Linear) and m.in_float8 for m in real.modules()):
        use_float8(model)
    layers = [m.base if isinstance(m, AdaptedLinear) else m for m in real.modules()]
    quantized = next((m for m in layers if isinstance(m, QuantizedLinear)), None)
    if quantized:
        whole_rows = quantized.scale.shape[1] == 1
        group = None if whole_rows else quantized.group
        quantize_layers(model, quantized.bits, group, symmetric=quantized.zero is None, rounds_inputs=False)
    if real.head_bytes is not None:
        multiply_head_in_bytes(model, model.device)
    for name, config in real.adapters.items():
        adapt(model, config, name)
    return model
