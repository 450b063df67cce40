"""Quantised layers as AutoGPTQ (and GPTQModel) and AutoAWQ write them: NAME.qweight, qzeros, scales and, of GPTQ,
g_idx, with `quantization_config` in config.json. Read only; what they say is kept as it is, integers and scales.

GPTQ: qweight int32 [in * bits / 32, out], columns of a word one after the other, low bits first; qzeros int32
[groups, out * bits / 32], one less than meant (`gptq_v2`: as meant). AWQ (4 bits, `gemm`): qweight int32 [in, out / 8],
qzeros [groups, out / 8]; the eight values of a word in the order 0 2 4 6 1 3 5 7. scales float16 [groups, out] in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from camelid.errors import FormatError, InputError
from camelid.formats.checkpoint import Stored, put_together
from camelid.model.quantized import Integers, unpacked

PARTS = ("qweight", "qzeros", "scales", "g_idx")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class AutoScheme:
    """`group` None: one scale for a whole row. `zero_offset` is what the file's zeros lack."""

    method: Literal["gptq", "awq"]
    bits: int
    group: int | None
    zero_offset: int = 0

    @property
    def label(self) -> str:
        """As protocols say it."""
        return f"{self.method} int{self.bits}, " + (
            "one scale a row" if self.group is None else f"groups of {self.group}"
        )


def read_auto_scheme(path: Path, raw: Mapping[str, Any]) -> AutoScheme:
    """The scheme of a `quantization_config` whose quant_method is gptq or awq. Raises InputError for a form that is not
    read here."""
    method, group = raw["quant_method"], raw.get("group_size")
    bits: Any = raw.get("bits")
    if not isinstance(group, int) or isinstance(group, bool) or group == 0 or group < -1:
        raise InputError(f"{path}: quantization_config.group_size is {group!r}, not a number of weights or -1")
    version = raw.get("version", "gemm") if method == "awq" else raw.get("checkpoint_format", "gptq")
    known = ("gemm",) if method == "awq" else ("gptq", "gptq_v2")
    if bits not in ((4,) if method == "awq" else (4, 8)) or str(version).lower() not in known:
        raise InputError(f"{path}: {method} of {bits} bits in the form {version!r}, which camelid does not read")
    offset = 1 if method == "gptq" and str(version).lower() == "gptq" else 0
    return AutoScheme(method, bits, None if group == -1 else group, offset)


def assembled_auto(tensors: Mapping[str, Stored], scheme: AutoScheme, path: Path) -> dict[str, Stored]:
    """Tensors as they are, quantised weights put together under NAME.weight; biases of nothing, which some writers add,
    are left out. Raises FormatError naming what is missing or does not fit."""
    needed = PARTS if scheme.method == "gptq" else PARTS[:3]
    kept = {name: t for name, t in tensors.items() if not name.endswith(".bias") or bool(t.dense().any())}

    def shape_of(parts: Mapping[str, Stored], what: str) -> tuple[int, int]:
        words, together = parts["qweight"].shape, 32 // scheme.bits
        if len(words) != 2:
            raise FormatError(f"{what}.qweight has {len(words)} dimensions, not 2")
        return (words[1], words[0] * together) if scheme.method == "gptq" else (words[1] * together, words[0])

    return put_together(kept, PARTS, needed, shape_of, lambda parts, what: _integers(parts, scheme, what), path)


def _integers(parts: Mapping[str, Tensor], scheme: AutoScheme, what: str) -> Integers:
    weight, zeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    together = 32 // scheme.bits
    whole = all(t.dim() == 2 and t.dtype == torch.int32 for t in (weight, zeros)) and scales.dim() == 2
    if not whole or not scales.is_floating_point():
        raise FormatError(f"{what}: qweight and qzeros are matrices of int32, scales one of floats")
    if scheme.method == "gptq":
        columns, rows = weight.shape[0] * together, weight.shape[1]
    else:
        columns, rows = weight.shape[0], weight.shape[1] * together
    group = scheme.group or columns
    fitting = [columns // group, rows]
    if columns % group or list(scales.shape) != fitting:
        raise FormatError(
            f"{what}.scales is {list(scales.shape)}, not {fitting}: {columns} inputs in groups of {group}"
        )
    if zeros.shape[0] != columns // group or zeros.shape[1] * together < rows:
        raise FormatError(f"{what}.qzeros is {list(zeros.shape)}, which does not fit its scales, {fitting}")
    if not scales.isfinite().all() or scales.abs().max() > 65504:
        raise FormatError(f"{what}.scales holds what is no scale: not finite, or beyond float16")
    if scheme.method == "gptq":
        order = torch.arange(columns) // group
        if parts["g_idx"].shape != order.shape or not torch.equal(parts["g_idx"].long(), order):
            raise InputError(f"{what}.g_idx: columns were reordered (desc_act), which camelid does not read")
        q = _words(weight.T, scheme.bits)
        zero = _words(zeros, scheme.bits)
    else:
        q, zero = _awq(weight).T, _awq(zeros)
    zero = zero[:, :rows].T.contiguous() + scheme.zero_offset
    return Integers.of(q.contiguous(), scales.T.contiguous().half(), zero, scheme.bits)


def _words(words: Tensor, bits: int) -> Tensor:
    """uint8 [rows, words * 32 / bits], the low bits of a word first."""
    return unpacked(words.contiguous().view(torch.uint8), bits)


def _awq(words: Tensor) -> Tensor:
    """uint8 [rows, words * 8] in AWQ's order."""
    place = torch.tensor(AWQ_ORDER).argsort()
    return _words(words, 4).view(len(words), -1, 8)[:, :, place].flatten(1)
