"""Low-rank adapters on a frozen model: LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353).

y = W x + s B (A x), with A [r, in], B [out, r]; s is alpha / r, or alpha / sqrt(r) for rsLoRA. DoRA also learns the
length m of each row of W: y = m / |W + s B A| (W x + s B A x), the length of the sum taken as a constant. Field names
are those of PEFT's adapter_config.json.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from camelid.errors import InputError
from camelid.kernels import narrow_products
from camelid.kernels.precision import product_dtype
from camelid.kernels.products import Weight, by_columns, by_rows
from camelid.kernels.remade import remade
from camelid.model.llama import Llama
from camelid.model.quantized import QuantizedLinear

Base = nn.Linear | QuantizedLinear
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter is. Raises InputError for a shape that cannot be built."""

    r: int = 8
    lora_alpha: float = 16.0
    target_modules: tuple[str, ...] = TARGETS
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise InputError(f"an adapter's rank must be at least 1, not {self.r}")
        unknown = [name for name in self.target_modules if name not in TARGETS]
        if unknown or not self.target_modules:
            raise InputError(
                f"no linear layer of a block is named {unknown[0] if unknown else '(none)'!r}: an adapter stands on "
                f"some of {', '.join(TARGETS)}"
            )

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class Lora(nn.Module):
    """One adapter of one layer: A drawn as a linear layer's weight, B zero, so it begins as nothing."""

    def __init__(self, base: Base, config: LoraConfig, dtype: torch.dtype, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = config.scale
        in_features, out_features = base.in_features, base.out_features
        device = (base.packed if isinstance(base, QuantizedLinear) else base.weight).device
        a = torch.empty(config.r, in_features, dtype=dtype, device="meta" if device.type == "meta" else "cpu")
        bound = 1 / math.sqrt(in_features)  # kaiming_uniform with a = sqrt(5), as in PEFT and torch
        if a.device.type != "meta":
            a.uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.r, dtype=dtype, device=device))
        self.lora_magnitude_vector: nn.Parameter | None = None
        if config.use_dora:
            self.lora_magnitude_vector = nn.Parameter(dense(base).to(dtype).norm(dim=1))

    def delta(self) -> Tensor:
        """s B A, [out, in]."""
        return self.scale * (self.lora_B @ self.lora_A)


class AdaptedLinear(nn.Module):
    """A linear layer with adapters by name, of which one or none is active."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.active is None:
            plain: Tensor = self.base(x)
            return plain
        lora: Any = self.adapters[self.active]
        out: Tensor = _Adapted.apply(  # type: ignore[no-untyped-call]
            x, lora.lora_A, lora.lora_B, lora.scale, self.base, product_dtype(x)
        )
        if lora.lora_magnitude_vector is not None:
            with torch.no_grad():
                length = (dense(self.base).to(lora.lora_A.dtype) + lora.delta()).norm(dim=1)
            out = out * (lora.lora_magnitude_vector / length).to(out.dtype)
        bias = self.base.bias
        return out if bias is None else out + bias.to(out.dtype)

    def merged(self, name: str) -> Tensor:
        """The weight [out, in] that does what the base with this adapter does, in the adapter's dtype."""
        lora: Any = self.adapters[name]
        total: Tensor = dense(self.base).to(lora.lora_A.dtype) + lora.delta()
        if lora.lora_magnitude_vector is not None:
            total = total * (lora.lora_magnitude_vector / total.norm(dim=1))[:, None]
        return total


def dense(base: Base) -> Tensor:
    """The weight [out, in] of a linear layer, plain or quantised."""
    return base.dense() if isinstance(base, QuantizedLinear) else base.weight


def _multiplied(base: Base, x: Tensor) -> Weight:
    """The weight as it meets states, or slopes, like x."""
    return base.multiplied(x) if isinstance(base, QuantizedLinear) else base.weight


class _Adapted(torch.autograd.Function):
    """x W^T + s (x A^T) B^T for a W that is not learned: of what is as long as the text, only x A^T is kept, and x
    where it cannot be made again. A quantised W that has to be widened for a product is not kept either."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, base: Base, product: torch.dtype) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            flat = x.to(product).flatten(0, -2)
            # Torch's product: its many small blocks, freed at once, keep ours from lying between the large ones, where
            # glibc would not join what is free (a tenth of a step's memory, docs/decisions.md).
            inner = flat @ a.to(product).T
            out = by_rows(flat, _multiplied(base, flat))
            narrow_products.up_(out, inner, b.T, scale)
        ctx.again, sources = remade(x)
        ctx.save_for_backward(inner, a, b, *(sources if ctx.again else (flat,)))
        ctx.scale, ctx.base, ctx.shape, ctx.dtype, ctx.product = scale, base, x.shape, x.dtype, product
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        inner, a, b, *kept = ctx.saved_tensors
        product = ctx.product
        with torch.autocast(slope.device.type, enabled=False):
            x = ctx.again.take(kept) if ctx.again else kept[0]
            flat = x.to(product).flatten(0, -2)
            slope = slope.to(product).flatten(0, -2)
            d_inner = narrow_products.down(slope, b, ctx.scale)
            d_x = None
            if ctx.needs_input_grad[0]:
                d_x = by_columns(slope, _multiplied(ctx.base, slope))
                d_x = narrow_products.up_(d_x, d_inner, a, 1.0).view(ctx.shape).to(ctx.dtype)
            d_a = narrow_products.between(d_inner, flat, 1.0).to(a.dtype) if ctx.needs_input_grad[1] else None
            d_b = narrow_products.between(slope, inner, ctx.scale).to(b.dtype) if ctx.needs_input_grad[2] else None
        return d_x, d_a, d_b, None, None, None


def adapt(
    model: Llama, config: LoraConfig, name: str = "default", *, dtype: torch.dtype | None = None, seed: int = 0
) -> None:
    """Freeze `model` and put a fresh adapter on its targets, in place; it becomes the active one, and the only part
    that is learned. `dtype` is the adapter's, float32 by default (float64 on a float64 model)."""
    if not re.fullmatch(r"[\w-]+", name):
        raise InputError(f"an adapter's name may hold letters, digits, - and _ only: {name!r}")
    dtype = dtype or (torch.float64 if model.dtype == torch.float64 else torch.float32)
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for _, parent, leaf in targets(model, config):
        layer = getattr(parent, leaf)
        if not isinstance(layer, AdaptedLinear):
            layer = AdaptedLinear(layer)
            setattr(parent, leaf, layer)
        layer.adapters[name] = Lora(layer.base, config, dtype, generator)
    model.adapters[name] = config
    use_adapter(model, name)


def targets(model: Llama, config: LoraConfig) -> list[tuple[str, Any, str]]:
    """(its name, its parent, its name there) of every layer that an adapter of this config stands on."""
    found = []
    for number, block in enumerate(model.layers):
        for part in ("self_attn", "mlp"):
            parent = getattr(block, part)
            found += [(f"layers.{number}.{part}.{leaf}", parent, leaf) for leaf in config.target_modules
                      if hasattr(parent, leaf)]  # fmt: skip
    return found


def use_adapter(model: Llama, name: str | None) -> None:
    """Make one of the model's adapters active, or none. Raises InputError for an unknown name."""
    if name is not None and name not in model.adapters:
        known = ", ".join(model.adapters) or "none"
        raise InputError(f"the model has no adapter named {name!r} (it has {known})")
    model.active_adapter = name
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.active = name if name is not None and name in module.adapters else None


@torch.no_grad()
def merge(model: Llama, name: str) -> None:
    """Put an adapter into the weights, in place; the model is a plain Llama then, all of it in its own dtype."""
    for _, parent, leaf in targets(model, model.adapters[name]):
        layer = getattr(parent, leaf)
        layer.base.weight.copy_(layer.merged(name))
    model.adapters.clear()
    model.active_adapter = None
    for _, parent, leaf in targets(model, LoraConfig()):
        layer = getattr(parent, leaf)
        if isinstance(layer, AdaptedLinear):
            setattr(parent, leaf, layer.base)
