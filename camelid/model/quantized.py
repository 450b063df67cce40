"""Linear layers whose weight is kept as small integers: w = scale * (q - zero), a scale and a zero for each group of a
row's weights.

Such a layer is the frozen base of an adapter, or part of a quantised model. A quantised model also rounds what goes
into its layers on a CPU, block by block, because the native kernels multiply bytes by bytes (`kernels/packed.py`): then
this is their reference. Products here are made with the weight widened for the moment; on a GPU by `kernels/gpu/`; and,
while an adapter learns over bytes with one scale a row, by `kernels/byte_products.py` where the CPU has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from camelid.errors import InputError
from camelid.kernels import byte_products
from camelid.kernels.byte_products import Bytes
from camelid.kernels.device import runs_triton
from camelid.kernels.packed import round_symmetric, rounded
from camelid.kernels.precision import product_dtype
from camelid.kernels.products import Weight, by_columns, by_rows
from camelid.model.llama import Llama

BITS = {"int8": 8, "int4": 4}
GROUP = 32  # weights that share a scale unless told otherwise


@dataclass(frozen=True)
class Integers:
    """packed uint8 [out, in * bits / 8]: q in 0 … 2^bits - 1, of 4 bits two a byte, the even column low. scale float16
    [out, in / group]; zero uint8 like it, None for 2^(bits - 1). With `least`, float16 like scale, a weight of 4 bits
    is scale * q + least, as in some blocks of GGUF."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    least: Tensor | None = None

    @classmethod
    def of(cls, q: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Self:
        """From q uint8 [out, in]."""
        return cls(packed(q, bits), scale, zero, bits)

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return len(self.packed), self.packed.shape[1] * 8 // self.bits

    @property
    def group(self) -> int:
        return self.shape[1] // self.scale.shape[1]

    @property
    def q(self) -> Tensor:
        """uint8 [out, in]."""
        return unpacked(self.packed, self.bits)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in]; exact in float32, but for a `least`."""
        steps = self.q.view(len(self.packed), -1, self.group).to(torch.float32)
        if self.least is None:
            steps -= 2 ** (self.bits - 1) if self.zero is None else self.zero[..., None]
        steps *= self.scale[..., None].float()
        if self.least is not None:
            steps += self.least[..., None].float()
        return steps.flatten(1).to(dtype)


def packed(q: Tensor, bits: int) -> Tensor:
    """q uint8 [rows, columns] of 8 bits as it is, of 4 bits two a byte, the even column low."""
    return q if bits == 8 else q[:, ::2] | q[:, 1::2] << 4


def unpacked(q: Tensor, bits: int) -> Tensor:
    """The inverse: uint8 [rows, columns]."""
    return q if bits == 8 else torch.stack((q & 15, q >> 4), -1).flatten(1)


def all_finite(numbers: Tensor) -> bool:
    """Whether none is NaN or infinite, in a tenth of the time of `isfinite` and without its memory."""
    return all(map(math.isfinite, map(float, numbers.aminmax())))


def round_to_nearest(weight: Tensor, bits: int, group: int, symmetric: bool = True) -> Integers:
    """The nearest steps to a weight [out, in]. No weight is off by more than half a step; with zeros, an end of the
    range gives way to a whole zero: at most half a step more.

    Raises InputError when groups do not divide a row, and for a weight that is not finite.
    """
    if weight.shape[1] % group or (bits == 4 and group % 2):
        raise InputError(f"groups of {group} do not divide a layer's {weight.shape[1]} inputs: choose another size")
    if symmetric and (found := round_symmetric(weight, bits, group)) is not None:
        return Integers(*found, None, bits)
    numbers = weight.data
    rehearsed = numbers.is_meta or type(numbers) is not Tensor  # shapes without numbers
    if not rehearsed and not all_finite(numbers):
        raise InputError("a weight is NaN or infinite, which no rounding keeps: camelid verify says where")
    groups = weight.detach().float().view(len(weight), -1, group)
    low, high = groups.amin(-1).clamp_max_(0), groups.amax(-1).clamp_min_(0)
    most, middle = 2**bits - 1, 2 ** (bits - 1)
    steps = torch.maximum(high / (middle - 1), -low / middle) if symmetric else (high - low) / most
    scale = steps.clamp_min_(2.0**-24).half()  # the least that float16 holds
    above = (scale.view(torch.int16) + 1).view(torch.float16)
    scale = torch.where(scale.float() < steps, above, scale)  # up, so that no weight lies beyond the last step
    wide = scale.float()
    zero = None if symmetric else (-low / wide).round_().clamp_(0, most)
    q = (groups / wide[..., None]).round_().add_(middle if zero is None else zero[..., None]).clamp_(0, most)
    return Integers.of(q.to(torch.uint8).flatten(1), scale, None if zero is None else zero.to(torch.uint8), bits)


class QuantizedLinear(nn.Module):
    """A frozen linear layer [in] -> [out]. With `rounds_inputs` its inputs are rounded to int8 by blocks on a CPU."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    least: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Integers, bias: Tensor | None, dtype: torch.dtype, rounds_inputs: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits, self.group, self.dtype, self.rounds_inputs = weight.bits, weight.group, dtype, rounds_inputs
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", weight.zero)
        self.register_buffer("least", weight.least)
        self.register_buffer("bias", bias)

    def integers(self) -> Integers:
        """The weight as it is kept."""
        return Integers(self.packed, self.scale, self.zero, self.bits, self.least)

    def dense(self) -> Tensor:
        """The weight [out, in] as it is multiplied, in the layer's dtype."""
        return self.integers().dense(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        plain = torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
        if not plain and self.least is None and runs_triton(x):
            from camelid.kernels.gpu.products import product

            out = product(x.flatten(0, -2), self.packed, self.scale, self.zero, self.bias, self.bits)
            return out.view(*x.shape[:-1], self.out_features)
        x = rounded(x) if self.rounds_inputs and x.device.type == "cpu" else x
        if torch.is_grad_enabled() and x.requires_grad:
            learned: Tensor = _Frozen.apply(x, self, product_dtype(x))  # type: ignore[no-untyped-call]
            return learned if self.bias is None else learned + self.bias.to(learned.dtype)
        return F.linear(x, self.dense().to(x.dtype), self.bias)

    @property
    def in_bytes(self) -> bool:
        """Whether the weight can be multiplied as it is: eight bits around their middle, one scale a row."""
        return self.bits == 8 and self.zero is None and self.scale.shape[1] == 1

    def multiplied(self, x: Tensor) -> Weight:
        """The weight as it meets states, or slopes, like x while an adapter learns: in bytes where that can be, else
        widened."""
        if self.in_bytes and byte_products.takes(x):
            return Bytes(self.packed, self.scale.view(-1).float())
        return self.dense()


class QuantizedEmbedding(nn.Module):
    """A frozen embedding [vocab, hidden] in whole numbers around their middle, or with least values: the rows that are
    looked up are widened."""

    packed: Tensor
    scale: Tensor
    least: Tensor | None

    def __init__(self, weight: Integers, dtype: torch.dtype) -> None:
        super().__init__()
        assert weight.zero is None
        self.bits, self.dtype = weight.bits, dtype
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("least", weight.least)

    def integers(self) -> Integers:
        """The rows as they are kept."""
        return Integers(self.packed, self.scale, None, self.bits, self.least)

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.flatten()
        least = None if self.least is None else self.least[flat]
        rows = Integers(self.packed[flat], self.scale[flat], None, self.bits, least)
        return rows.dense(self.dtype).view(*ids.shape, -1)


class _Frozen(torch.autograd.Function):
    """x W^T for a layer that is not learned: what has to be widened is so again for the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, product: torch.dtype) -> Tensor:
        ctx.layer, ctx.dtype, ctx.product = layer, x.dtype, product
        with torch.autocast(x.device.type, enabled=False):
            flat = x.to(product).reshape(-1, layer.in_features)
            return by_rows(flat, layer.multiplied(flat)).view(*x.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        with torch.autocast(slope.device.type, enabled=False):
            flat = slope.to(ctx.product).reshape(-1, ctx.layer.out_features)
            d_x = by_columns(flat, ctx.layer.multiplied(flat))
        return d_x.view(*slope.shape[:-1], ctx.layer.in_features).to(ctx.dtype), None, None


def quantized(linear: nn.Linear, bits: int, group: int | None, symmetric: bool, rounds_inputs: bool) -> QuantizedLinear:
    """A linear layer, its weight rounded to nearest, by groups or (None) by whole rows."""
    bias = None if linear.bias is None else linear.bias.detach()
    weight = round_to_nearest(linear.weight, bits, group or linear.in_features, symmetric)
    return QuantizedLinear(weight, bias, linear.weight.dtype, rounds_inputs)


def quantize_layers(
    model: Llama, bits: int, group: int | None = 32, symmetric: bool = True, rounds_inputs: bool = True
) -> None:
    """Round the linear layers of the model's blocks to nearest, in place; those that are quantised stay as they are."""
    for parent in list(model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, quantized(child, bits, group, symmetric, rounds_inputs))


def quantize_head(model: Llama, group: int = 32) -> None:
    """The output projection in int8, in place, as the engine runs quantised models, but for one that is in whole
    numbers already; the embedding stays as it is."""
    if isinstance(model.lm_head, nn.Linear) and model.lm_head.in_features % group == 0:
        model.add_module("lm_head", quantized(model.lm_head, 8, group, symmetric=True, rounds_inputs=True))


def multiply_head_in_bytes(model: Llama, device: torch.device) -> None:
    """Let the loss over a base in bytes meet the output projection in bytes, too, in place, where `device` multiplies
    them: a copy rounded by whole rows beside the weight, which all else reads. It does not follow the weight."""
    layers, weight = [m for m in model.modules() if isinstance(m, QuantizedLinear)], model.lm_head.weight
    fits = byte_products.multiplies(device) and weight.dtype in byte_products.DTYPES
    if fits and layers and all(layer.in_bytes for layer in layers):
        kept = round_to_nearest(weight, 8, weight.shape[1])
        model.head_bytes, model.head_scale = kept.packed, kept.scale.view(-1).float()


def keep_inputs(model: Llama) -> None:
    """Let quantised layers take their inputs as they are: what an adapter on top of them learns from must have
    slopes."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.rounds_inputs = False


def without_least(model: Llama) -> None:
    """Layers with a least value for each group as int8 around a middle, in place: what a GPU multiplies."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLinear) and child.least is not None:
                weight = round_to_nearest(child.integers().dense(), 8, GROUP)
                setattr(module, name, QuantizedLinear(weight, child.bias, child.dtype, child.rounds_inputs))


def is_quantized(model: Llama) -> bool:
    """Whether any layer is kept in integers."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def make_dense(model: Llama) -> None:
    """Put plain linear layers in the place of quantised ones, in place: the same weights, one number each."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear):
                linear = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None, device="meta")
                linear.weight = nn.Parameter(child.dense())
                if child.bias is not None:
                    linear.bias = nn.Parameter(child.bias.detach())
                setattr(parent, name, linear)
