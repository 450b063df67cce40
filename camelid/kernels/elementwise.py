"""Passes over large tensors that are worth a fused loop: torch reference, the native library on a CPU, Triton on a GPU;
there the loss's pass is the reference, compiled."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from camelid.kernels.device import compiles, infers, runs_triton
from camelid.kernels.library import library


def _native_takes(*tensors: Tensor) -> bool:
    """Whether these go through the native library: in inference mode only, for what is trained, measured while training
    or a reference of training must come out of the same arithmetic."""
    first = tensors[0]
    return (
        infers()
        and all(t.device.type == "cpu" and t.dtype == first.dtype for t in tensors)
        and first.dtype in (torch.float32, torch.bfloat16)
        and not any(isinstance(t, FakeTensor) for t in tensors)
        and library() is not None
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension (arXiv:1910.07467), in float32 or better, rounded to
    x's dtype before the product with the weight."""
    if _native_takes(x, weight) and weight.shape == x.shape[-1:]:
        return _native_rms_norm(x.contiguous(), weight.contiguous(), eps)
    if infers() and runs_triton(x) and weight.dtype == x.dtype:
        from camelid.kernels.gpu import elementwise

        return elementwise.rms_norm(x, weight, eps)
    return _rms_norm(x, weight, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # bfloat16 and float16 are widened; float64 stays, so a float64 model is float64 throughout.
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def _native_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    native, out = library(), torch.empty_like(x)
    assert native is not None
    size = x.shape[-1]
    native.camelid_rms_norm(
        *(ctypes.c_void_p(t.data_ptr()) for t in (x, weight, out)),
        ctypes.c_int(x.dtype == torch.bfloat16),
        ctypes.c_int64(x.numel() // size),
        ctypes.c_int64(size),
        ctypes.c_float(eps),
        ctypes.c_int(torch.get_num_threads()),
    )
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv:2002.05202). Only gate and up are kept for the backward pass, silu(gate) is made again."""
    if _native_takes(gate, up) and gate.shape == up.shape:
        return _native_swiglu(gate.contiguous(), up.contiguous())
    if infers():
        if runs_triton(gate):
            from camelid.kernels.gpu import elementwise

            return elementwise.swiglu(gate, up)
        return F.silu(gate) * up
    out: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


def _native_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    native, out = library(), torch.empty_like(gate)
    assert native is not None
    native.camelid_swiglu(
        *(ctypes.c_void_p(t.data_ptr()) for t in (gate, up, out)),
        ctypes.c_int(gate.dtype == torch.bfloat16),
        ctypes.c_int64(gate.numel()),
        ctypes.c_int(torch.get_num_threads()),
    )
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(slope * up, gate), slope * F.silu(gate)


def softmax_gradient_(logits: Tensor, labels: Tensor, z_loss: float = 0.0, gradient: bool = True) -> Tensor:
    """log-sum-exp of each row [tokens], float32 (float64 for float64). With `gradient`, logits [tokens, vocab] become
    the derivative of sum(log_sum - logits[label] + z_loss * log_sum^2) by them, in their own dtype."""
    if isinstance(logits, FakeTensor):  # a rehearsal: the native pass makes nothing but the sums
        return torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    native = library()
    if native is not None and logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16):
        return _native_softmax_gradient(native, logits, labels, z_loss, gradient)
    one_pass = _compiled(_softmax_gradient) if logits.device.type == "cuda" and compiles() else _softmax_gradient
    log_sum: Tensor = one_pass(logits, labels, z_loss, gradient)
    return log_sum


def _softmax_gradient(logits: Tensor, labels: Tensor, z_loss: float, gradient: bool) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_sum = wide.logsumexp(1)
    if gradient:
        scale = 1 + 2 * z_loss * log_sum
        slope = (wide - log_sum[:, None]).exp_().mul_(scale[:, None])
        slope.scatter_add_(1, labels[:, None], torch.full_like(log_sum, -1.0)[:, None])
        logits.copy_(slope)
    return log_sum


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    made: Callable[..., Tensor] = torch.compile(function)
    return made


def _native_softmax_gradient(
    native: ctypes.CDLL, logits: Tensor, labels: Tensor, z_loss: float, gradient: bool
) -> Tensor:
    logits_kept, labels_kept = logits.contiguous(), labels.contiguous()
    rows, vocab = logits.shape
    log_sum = torch.empty(rows, dtype=torch.float32)
    native.camelid_softmax_gradient(
        ctypes.c_void_p(logits_kept.data_ptr()),
        ctypes.c_int(logits.dtype == torch.bfloat16),
        ctypes.c_void_p(labels_kept.data_ptr()),
        ctypes.c_void_p(log_sum.data_ptr()),
        ctypes.c_int64(rows),
        ctypes.c_int64(vocab),
        ctypes.c_float(z_loss),
        ctypes.c_int(gradient),
        ctypes.c_int(torch.get_num_threads()),
    )
    if gradient and logits_kept is not logits:
        logits.copy_(logits_kept)
    return log_sum
