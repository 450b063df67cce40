"""A linear layer multiplied in float8 on a GPU, at up to twice bfloat16's rate (arXiv:2209.05433).

What goes forward is E4M3, 4 bits of exponent and 3 of mantissa, slopes are E5M2, each tensor over one scale, so that
its greatest value is the format's. Sums are float32, on Hopper's chips with fewer bits going forward. Weights, moments
and what lies between products keep their dtypes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
ALIKE = 16  # sizes that such products take are multiples of it
CAPABILITY = (8, 9)  # of the GPUs that multiply float8
LEAST = 1e-30  # a scale's: a tensor of zeros has one too


def multiplies(device: torch.device) -> bool:
    """Whether `device` multiplies float8: NVIDIA's do from Ada and Hopper on."""
    return (
        device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= CAPABILITY
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in bfloat16: x [..., in], weight [out, in], both sizes multiples of ALIKE. Gradients have the dtypes
    of x and weight."""
    flat = x.flatten(0, -2)
    rows = len(flat)
    if rows % ALIKE:
        flat = F.pad(flat, (0, 0, 0, -rows % ALIKE))
    out: Tensor = _Linear.apply(flat, weight)[:rows]  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        flat, scale = narrowed(x, FORWARD)
        narrow, weight_scale = narrowed(weight, FORWARD)
        # The weight is there anyway: rounding it again costs less than keeping what was made of it.
        ctx.save_for_backward(flat, scale, weight, weight_scale)
        ctx.dtype = x.dtype
        return torch._scaled_mm(
            flat, narrow.T, scale_a=scale, scale_b=weight_scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, scale, weight, weight_scale = ctx.saved_tensors
        flat, slope_scale = narrowed(slope, BACKWARD)
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            across = _across(rounded(weight, weight_scale, FORWARD))
            d_x = torch._scaled_mm(flat, across, scale_a=slope_scale, scale_b=weight_scale, out_dtype=torch.bfloat16)
            d_x = d_x.to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = torch._scaled_mm(
                flat.T.contiguous(), _across(x), scale_a=slope_scale, scale_b=scale, out_dtype=weight.dtype
            )
        return d_x, d_weight


def narrowed(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x over its scale in a float8 dtype, and the scale, float32. What is not finite makes all of it NaN."""
    scale = (x.abs().amax().float() / torch.finfo(dtype).max).clamp(min=LEAST)
    return rounded(x, scale, dtype), scale


def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x over `scale`, row after row in memory."""
    most = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-most, most).to(dtype).contiguous()


def _across(matrix: Tensor) -> Tensor:
    """The same matrix with its columns in a piece each, as the right factor must lie."""
    return matrix.T.contiguous().T
