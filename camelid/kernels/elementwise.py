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
from torch.autograd.function import once_differentiable

from camelid.kernels.device import compiles, infers, runs_triton
from camelid.kernels.library import library
from camelid.kernels.packed import PLAIN
from camelid.kernels.precision import product_dtype
from camelid.kernels.remade import remakes

STRETCH = 64  # rows whose share of a norm's weight's derivative is summed by itself


def _native_takes(*tensors: Tensor) -> bool:
    """Whether these go through the native library: whatever is computed in inference mode, and what is multiplied in
    bfloat16 while a model learns. Learning in float32 stays torch's own: a committed file holds its losses."""
    first = tensors[0]
    return (
        all(type(t) in PLAIN and t.device.type == "cpu" and t.dtype == first.dtype and t.numel() > 0 for t in tensors)
        and {first.dtype, product_dtype(first)} <= {torch.float32, torch.bfloat16}
        and (infers() or _learns_in_bfloat16(first))
        and library() is not None
    )


def _learns_in_bfloat16(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and product_dtype(x) == torch.bfloat16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension (arXiv:1910.07467), in float32 or better, rounded to
    x's dtype before the product with the weight. Under autocast it comes out in the dtype of products, rounded once for
    all projections."""
    if _native_takes(x) and weight.shape == x.shape[-1:]:
        wide, out = weight.float().contiguous(), product_dtype(x)
        if infers():
            return _native_rms_norm(x.contiguous(), wide, eps, out)[0]
        x = x.contiguous()
        normed: Tensor = _RMSNorm.apply(x, wide, eps, out)  # type: ignore[no-untyped-call]
        return remakes(normed, lambda x, wide: _native_rms_norm(x, wide, eps, out)[0], x, wide)
    if infers() and runs_triton(x) and weight.dtype == x.dtype:
        from camelid.kernels.gpu import elementwise

        return elementwise.rms_norm(x, weight, eps)
    dtype = product_dtype(x)
    return remakes(
        _rms_norm(x, weight, eps).to(dtype), lambda x, weight: _rms_norm(x, weight, eps).to(dtype), x, weight
    )


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # bfloat16 and float16 are widened; float64 stays, so a float64 model is float64 throughout.
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """`rms_norm` of a float32 weight. Of what is as long as the text, only x is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        out, scales = _native_rms_norm(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, scales = ctx.saved_tensors
        slope, size = slope.contiguous(), x.shape[-1]
        d_x = torch.empty_like(x)
        d_weight = (
            x.new_empty(-(-len(scales) // STRETCH), size, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        _call(
            "camelid_rms_norm_back", (x, weight, scales, slope, d_x, d_weight),
            _is_bfloat16(x), _is_bfloat16(slope), *map(ctypes.c_int64, (len(scales), size, STRETCH)),
        )  # fmt: skip
        return d_x, None if d_weight is None else d_weight.sum(0), None, None


def _native_rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """And what each row was multiplied by, float32 [rows]."""
    out, size = torch.empty_like(x, dtype=dtype), x.shape[-1]
    scales = x.new_empty(x.numel() // size, dtype=torch.float32)
    _call(
        "camelid_rms_norm", (x, weight, out, scales),
        _is_bfloat16(x), _is_bfloat16(out), *map(ctypes.c_int64, (len(scales), size)), ctypes.c_float(eps),
    )  # fmt: skip
    return out, scales


def added(x: Tensor, y: Tensor) -> Tensor:
    """x + y: a residual stream and what a layer adds to it. Where that is narrower, torch would widen it first."""
    fitting = x.dtype == torch.float32 and y.dtype == torch.bfloat16 and x.shape == y.shape
    if not fitting or type(y) not in PLAIN or y.device.type != "cpu" or not _native_takes(x):
        return x + y
    x, y = x.contiguous(), y.contiguous()
    out: Tensor = _native_sum(x, y) if infers() else _Sum.apply(x, y)  # type: ignore[no-untyped-call]
    return out


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return _native_sum(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        return slope, slope.to(torch.bfloat16)


def _native_sum(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _call("camelid_add", (x, y, out), ctypes.c_int64(x.numel()))
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv:2002.05202). Only gate and up are kept for the backward pass, silu(gate) is made again."""
    if _native_takes(gate, up) and gate.shape == up.shape:
        gate, up = gate.contiguous(), up.contiguous()
        if infers():
            return _native_swiglu(gate, up)
        gated: Tensor = _NativeSwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
        return remakes(gated, _native_swiglu, gate, up)
    if infers():
        if runs_triton(gate):
            from camelid.kernels.gpu import elementwise

            return elementwise.swiglu(gate, up)
        return F.silu(gate) * up
    out: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return remakes(out, _gated, gate, up)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _native_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    _call("camelid_swiglu", (gate, up, out), _is_bfloat16(gate), ctypes.c_int64(gate.numel()))
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(slope * up, gate), slope * F.silu(gate)


class _NativeSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _native_swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        tensors = (gate, up, slope.contiguous(), d_gate, d_up)
        _call("camelid_swiglu_back", tensors, _is_bfloat16(gate), ctypes.c_int64(gate.numel()))
        return d_gate, d_up


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + head_dim/2) of x [batch, heads, seq, head_dim] turned by angles whose cos and sin are float32
    [seq, head_dim/2] or [batch, seq, head_dim/2]. See `model.rope`."""
    batch, _, length, size = x.shape
    rows = cos.shape[:-2]  # none, or one for each text
    fitting = cos.shape[-2:] == (length, size // 2) and rows in ((), (batch,)) and size % 2 == 0
    if fitting and cos.dtype == torch.float32 and _native_takes(x):
        x = x if x.stride(3) == 1 else x.contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        if infers():
            return _native_turn(x, cos, sin, back=False)
        turned: Tensor = _Turn.apply(x, cos, sin)  # type: ignore[no-untyped-call]
        return turned
    if infers() and runs_triton(x):
        from camelid.kernels.gpu import elementwise

        return elementwise.turn_pairs(x, cos, sin)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _native_turn(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _native_turn(slope if slope.stride(3) == 1 else slope.contiguous(), cos, sin, back=True), None, None


def _native_turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Laid out as a linear layer wrote it, [batch, seq, heads, head_dim]: going back it is taken as it lies."""
    batch, heads, length, size = x.shape
    out = x.new_empty(batch, length, heads, size).transpose(1, 2)
    apart = length * size // 2 if cos.dim() == 3 else 0
    shape = (batch, heads, length, size // 2, apart, *x.stride()[:3], *out.stride()[:3])
    _call("camelid_turn_pairs", (x, out, cos, sin), (ctypes.c_int64 * 11)(*shape), _is_bfloat16(x), ctypes.c_int(back))
    return out


def _is_bfloat16(x: Tensor) -> ctypes.c_int:
    return ctypes.c_int(x.dtype == torch.bfloat16)


def _call(name: str, tensors: tuple[Tensor | None, ...], *rest: Any) -> None:
    """A native pass over `tensors`, on as many threads as torch uses."""
    if isinstance(tensors[0], FakeTensor):  # a rehearsal: there is nothing to compute
        return
    native = library()
    assert native is not None
    places = (ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors)
    getattr(native, name)(*places, *rest, ctypes.c_int(torch.get_num_threads()))


def softmax_gradient_(logits: Tensor, labels: Tensor, z_loss: float = 0.0, gradient: bool = True) -> Tensor:
    """log-sum-exp of each row [tokens], float32 (float64 for float64). With `gradient`, logits [tokens, vocab] become
    the derivative of sum(log_sum - logits[label] + z_loss * log_sum^2) by them, in their own dtype."""
    fake = isinstance(logits, FakeTensor)  # a rehearsal: the native pass makes nothing but the sums
    real = logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16) and library() is not None
    if fake or real:
        return _native_softmax_gradient(logits, labels, z_loss, gradient)
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


def _native_softmax_gradient(logits: Tensor, labels: Tensor, z_loss: float, gradient: bool) -> Tensor:
    kept = logits.contiguous()
    log_sum = logits.new_empty(len(logits), dtype=torch.float32)
    _call(
        "camelid_softmax_gradient", (kept, labels.contiguous(), log_sum), _is_bfloat16(logits),
        *map(ctypes.c_int64, logits.shape), ctypes.c_float(z_loss), ctypes.c_int(gradient),
    )  # fmt: skip
    if gradient and kept is not logits:
        logits.copy_(kept)
    return log_sum
