"""Quantised layers in a Hugging Face folder, in the `pack-quantized` form of compressed-tensors, which transformers and
vLLM open: instead of NAME.weight, the tensors NAME.weight_packed (int32, the integers of a row one after the other, low
bits first), weight_scale, weight_shape and, unless the zero is in the middle, weight_zero_point; and what they mean
under `quantization_config` of config.json.

The folder's layers are what is said there; the embedding and the output projection stay as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camelid.errors import FormatError, InputError
from camelid.formats.checkpoint import Stored, put_together
from camelid.model.llama import Llama
from camelid.model.quantized import Integers, QuantizedLinear, packed, unpacked

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


@dataclass(frozen=True)
class Scheme:
    """How the linear layers are kept: `bits` a weight, a scale for every `group` inputs (None: for a whole row)."""

    bits: int
    group: int | None
    symmetric: bool = True

    @property
    def label(self) -> str:
        """As protocols say it."""
        groups = "one scale a row" if self.group is None else f"groups of {self.group}"
        return f"int{self.bits}, {groups}{'' if self.symmetric else ', with zeros'}"

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        weights = {
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False,
            "strategy": "channel" if self.group is None else "group", "group_size": self.group,
        }  # fmt: skip
        return {
            "quant_method": METHOD, "format": FORMAT, "quantization_status": "compressed", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        }  # fmt: skip


def read_scheme(path: Path, raw: object) -> Scheme:
    """The scheme of a `quantization_config`. Raises InputError for another method, and for what would change the
    computation and is not known here."""
    if not isinstance(raw, Mapping):
        raise FormatError(f"{path}: quantization_config is a {type(raw).__name__}, not an object")
    method = raw.get("quant_method", "unknown")
    if method != METHOD:
        raise InputError(f"{path}: weights are quantised ({method}); open the full-precision model instead")
    groups = raw.get("config_groups")
    if raw.get("format") != FORMAT or not isinstance(groups, dict) or len(groups) != 1:
        form = raw.get("format")
        raise InputError(f"{path}: compressed-tensors of the form {form!r}; camelid reads {FORMAT} in one group")
    [group] = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise FormatError(f"{path}: quantization_config.config_groups says nothing of weights")
    bits, size, strategy = weights.get("num_bits"), weights.get("group_size"), weights.get("strategy")
    known = weights.get("type") == "int" and strategy == ("channel" if size is None else "group")
    if bits not in (4, 8) or not known or not (size is None or (isinstance(size, int) and size > 0)):
        raise InputError(
            f"{path}: weights of {bits} bits, type {weights.get('type')!r}, strategy {strategy!r}, "
            f"group_size {size!r}; camelid reads whole numbers of 4 or 8 bits, by group or channel"
        )
    if group.get("input_activations") or group.get("output_activations") or raw.get("kv_cache_scheme"):
        raise InputError(f"{path}: activations or the cache are quantised too, which camelid does not implement")
    return Scheme(bits, size, bool(weights.get("symmetric", True)))


def assembled(tensors: Mapping[str, Stored], scheme: Scheme, path: Path) -> dict[str, Stored]:
    """Tensors as they are, quantised weights put together under NAME.weight. Raises FormatError naming what is missing
    or does not fit."""
    needed = PARTS if not scheme.symmetric else PARTS[:3]

    def shape_of(parts: Mapping[str, Stored], what: str) -> tuple[int, int]:
        words = parts["weight_packed"].shape
        if len(words) != 2:
            raise FormatError(f"{what}.weight_packed has {len(words)} dimensions, not 2")
        return words[0], words[1] * 32 // scheme.bits

    return put_together(tensors, PARTS, needed, shape_of, lambda parts, what: _integers(parts, scheme, what), path)


def _integers(parts: Mapping[str, Tensor], scheme: Scheme, what: str) -> Integers:
    shape, integers, scale = parts["weight_shape"], parts["weight_packed"], parts["weight_scale"]
    if shape.numel() != 2 or shape.is_floating_point():
        raise FormatError(f"{what}.weight_shape must be two whole numbers, not {shape.tolist()}")
    rows, columns = (int(n) for n in shape)
    group = scheme.group or columns
    if rows < 1 or columns < 1 or columns % group or columns * scheme.bits % 32:
        raise FormatError(f"{what}: a weight of {rows} x {columns} cannot be in groups of {group} and whole words")
    _must(integers, (rows, columns * scheme.bits // 32), torch.int32, f"{what}.weight_packed")
    _must(scale, (rows, columns // group), None, f"{what}.weight_scale")
    # Kept as float16: below 6e-5 to the nearest 6e-8, which moves no weight by more than 8e-6 (of 8 bits).
    if not scale.is_floating_point() or not scale.isfinite().all() or scale.abs().max() > 65504:
        raise FormatError(f"{what}.weight_scale holds what is no scale: not finite, or beyond float16")
    zero = None
    if not scheme.symmetric:
        words = parts["weight_zero_point"]
        _must(words, (-(-rows * scheme.bits // 32), columns // group), torch.int32, f"{what}.weight_zero_point")
        zero = unpacked(words.T.contiguous().view(torch.uint8), scheme.bits)[:, :rows].T.contiguous()
    # The words' bytes are the integers as they are kept.
    return Integers(integers.contiguous().view(torch.uint8), scale.half(), zero, scheme.bits)


def _must(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None, what: str) -> None:
    if tuple(tensor.shape) != shape or (dtype is not None and tensor.dtype != dtype):
        raise FormatError(f"{what} is {tensor.dtype} {list(tensor.shape)}; its weight needs {list(shape)}")


def _words(q: Tensor, bits: int) -> Tensor:
    """q uint8 [rows, columns] as int32, rows filled up to whole words."""
    whole = packed(torch.nn.functional.pad(q, (0, -q.shape[1] % (32 // bits))), bits)
    return whole.flatten().view(torch.int32).view(len(q), -1)


def parts_of(layer: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of one quantised layer, by the names in PARTS."""
    weight = layer.integers()
    found = {
        "weight_packed": weight.packed.contiguous().view(torch.int32),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if weight.zero is not None:
        found["weight_zero_point"] = _words(weight.zero.T.contiguous(), weight.bits).T.contiguous()
    if layer.bias is not None:
        found["bias"] = layer.bias
    return found


def named_tensors(model: Llama) -> tuple[dict[str, Tensor], Scheme | None]:
    """A model's tensors as a folder holds them, by the model's own names, and how its quantised layers are kept, if
    any. Raises InputError when they are not all kept alike, the output projection is one of them, or a group has a
    least value, for which compressed-tensors has no word."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    if not layers:
        return tensors, None
    if any(m.least is not None for m in layers.values()):
        raise InputError("the layers have least values, as in GGUF's Q4_1 and Q4_K: a folder of integers has zeros")
    groups, kinds = {m.group for m in layers.values()}, {(m.bits, m.zero is None) for m in layers.values()}
    whole_rows = all(m.group == m.in_features for m in layers.values())
    if "lm_head" in layers or len(kinds) > 1 or (len(groups) > 1 and not whole_rows):
        raise InputError(
            "the layers are quantised in several ways, or the output projection is: a folder holds one way"
        )
    for name, layer in layers.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts_of(layer).items()}
    [(bits, symmetric)] = kinds
    return tensors, Scheme(bits, groups.pop() if len(groups) == 1 else None, symmetric)
