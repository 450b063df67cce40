"""Norm, gate and rotation, native and torch's own, and the threads that they run on."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch

from camelid.kernels import elementwise
from camelid.kernels.elementwise import added, rms_norm, swiglu, turn_pairs
from camelid.kernels.library import PATH, library
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama

native = pytest.mark.skipif(library() is None, reason="the native library is not built here")


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 32), (5, 7, 37), (1, 1), (2, 9, 576), (700, 401)])
def test_passes_of_inference_are_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The native norm and gate against torch, odd sizes and several threads included; large and tiny values too."""
    torch.manual_seed(0)
    x, y = (torch.randn(2, *shape) * torch.tensor([1e-3, 30.0])[torch.randint(0, 2, shape)]).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    close = {"rtol": 1e-2, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 2e-6, "atol": 1e-9}
    for work in (lambda: rms_norm(x, weight, 1e-5), lambda: swiglu(x, y)):
        wanted = work()
        with torch.inference_mode():
            found = work()
        assert found.dtype == dtype
        assert found.shape == x.shape
        torch.testing.assert_close(found, wanted.detach(), **close)
        differ = (found.float() - wanted.detach().float()).abs() > 2e-6 * wanted.detach().float().abs() + 1e-9
        assert differ.float().mean() < (0.01 if found.numel() > 200 else 0.5)  # of bfloat16, a few round the other way


def slopes(
    work: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], native_used: bool = True
) -> list[torch.Tensor]:
    """What `work` makes of inputs under bfloat16 autocast, and its derivatives by all of them."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        out = work(*leaves)
    assert (
        any(name in type(out.grad_fn).__name__ for name in ("_RMSNorm", "_NativeSwiGLU", "_Turn", "_Sum"))
        == native_used
    )
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn(out.shape).bfloat16().to(out.dtype))]


CHANCE = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=CHANCE)


TABLES = [t for angles in drawn(2, 3 * 61, 37) for t in (angles.cos(), angles.sin())]
LEARNED: dict[str, tuple[Callable[..., torch.Tensor], list[torch.Tensor]]] = {
    "norm of float32": (lambda x, w: rms_norm(x, w, 1e-5), [drawn(3, 61, 401), drawn(401)]),
    "norm of bfloat16": (
        lambda x, w: rms_norm(x, w, 1e-5), [drawn(200, 37).bfloat16(), drawn(37).bfloat16()]
    ),
    "norm by every other weight": (
        lambda x, w: rms_norm(x, w[::2], 1e-5), [drawn(9, 33), drawn(66)]
    ),
    "norm of one row": (lambda x, w: rms_norm(x, w, 1e-5), [drawn(1, 5), drawn(5)]),
    "sum": (added, [drawn(3, 401), drawn(3, 401).bfloat16()]),
    "sum of many, laid out otherwise": (added, [drawn(700, 401).T, drawn(401, 700).bfloat16()]),
    "gate": (swiglu, [(4 * drawn(7, 1001)).bfloat16(), drawn(7, 1001).bfloat16()]),
    "gate of many": (swiglu, [(4 * drawn(700, 401)).bfloat16(), drawn(700, 401).bfloat16()]),
    "turn": (lambda x: turn_pairs(x, TABLES[0][:61], TABLES[1][:61]), [drawn(3, 4, 61, 74).bfloat16()]),
    "turn by row": (
        lambda x: turn_pairs(x, TABLES[2].view(3, 61, 37), TABLES[3].view(3, 61, 37)),
        [drawn(3, 61, 4, 74).bfloat16().transpose(1, 2)],
    ),
    "turn of many": (lambda x: turn_pairs(x, TABLES[0], TABLES[1]), [drawn(9, 20, 183, 74).bfloat16()]),
    "turn of a part": (
        lambda x: turn_pairs(x[:, 1:3, ::2], TABLES[0][:31], TABLES[1][:31]), [drawn(3, 4, 61, 74).bfloat16()]
    ),
}  # fmt: skip


@native
@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("threads", [1, 3])
def test_passes_of_learning_are_the_reference(name: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and derivatives, against torch in float64: no farther from it than bfloat16's rounding of what goes in and
    out, and no farther than torch's own passes in bfloat16 are."""
    work, inputs = LEARNED[name]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = slopes(work, inputs)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(elementwise, "library", lambda: None)
    theirs = slopes(work, inputs, native_used=False)
    exact = slopes(work, [x.double() for x in inputs], native_used=False)
    for found, reference, wanted in zip(ours, theirs, exact, strict=True):
        assert (found.dtype, found.shape) == (reference.dtype, reference.shape)
        error, usual = ((x.double() - wanted).norm() / wanted.norm() for x in (found, reference))
        assert error < 4e-3
        assert error < 1.1 * usual + 1e-6


@native
def test_threads_change_no_bit_of_a_pass() -> None:
    before, found = torch.get_num_threads(), []
    x, weight = torch.randn(3000, 129), torch.randn(129)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(slopes(lambda x, w: rms_norm(x, w, 1e-5), [x, weight]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


WITHOUT_TORCH = """
import ctypes, sys
native, count, found = ctypes.CDLL(sys.argv[1]), 3 << 17, []
assert not hasattr(ctypes.CDLL(None), "GOMP_parallel")
for threads in (1, 3):
    gate = (ctypes.c_float * count)(*[i % 17 - 8.0 for i in range(count)])
    out = (ctypes.c_float * count)()
    native.camelid_swiglu(gate, gate, out, 0, ctypes.c_int64(count), threads)
    found.append(bytes(out))
assert found[0] == found[1] and any(found[1][-4:])
"""


@native
def test_threads_of_its_own_where_torch_has_none() -> None:
    if sys.platform == "linux":
        assert hasattr(ctypes.CDLL(None), "GOMP_parallel")  # here, beside torch, they are torch's
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(PATH)], check=True)


FORKED = """
import os, signal, torch
from camelid.kernels.elementwise import swiglu
torch.set_num_threads(2)
x = torch.randn(1 << 19)
with torch.inference_mode():
    wanted = swiglu(x, x).numpy().tobytes()
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(swiglu(x, x).numpy().tobytes() != wanted)
assert os.waitpid(child, 0)[1] == 0
"""


@native
def test_a_forked_process_does_not_wait_for_its_parents_threads() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True)


@native
def test_float32_learns_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/train/losses.json holds it to the last bit."""
    x, weight = torch.randn(9, 33, requires_grad=True), torch.randn(33, requires_grad=True)
    angles = torch.randn(9, 16)
    found = []
    for _ in range(2):
        out = rms_norm(x, weight, 1e-5) + swiglu(x, x)
        turned = turn_pairs(x.view(1, 1, 9, 33)[..., :32], angles.cos(), angles.sin())
        found.append([out, *torch.autograd.grad(out.sum() + turned.square().sum() + turned.sum(), [x, weight])])
        monkeypatch.setattr(elementwise, "library", lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_extremes_of_the_gate() -> None:
    x = torch.tensor([-1e30, -100.0, -0.0, 0.0, 100.0, 1e30, torch.inf, torch.nan])
    with torch.inference_mode():
        found = swiglu(x, torch.ones(8))
    assert found[:6].tolist() == pytest.approx([0, 0, 0, 0, 100, 1e30], rel=1e-6, abs=1e-30)
    assert found[6] == torch.inf
    assert found[7].isnan()


def test_a_gate_of_another_shape_is_broadcast() -> None:
    gate, up = torch.ones(2, 3), torch.tensor([1.0, 2.0, 3.0])
    with torch.inference_mode():
        assert torch.equal(swiglu(gate, up), torch.nn.functional.silu(gate) * up)
        assert torch.equal(rms_norm(gate, torch.ones(1), 0.0), torch.ones(2, 3))


def test_nothing_is_native_that_is_no_known_number() -> None:
    """Other kinds, empty tensors, and shapes that torch broadcasts or refuses."""
    x, half, cos = torch.randn(4, 64), torch.randn(1, 2, 5, 8), torch.randn(3, 5, 4)
    with torch.inference_mode():
        with torch.autocast("cpu", torch.float16):
            for given in (x, x.bfloat16()):
                found = rms_norm(given, torch.ones(64), 1e-5)
                assert found.dtype == torch.float16
                assert (found.float().square().mean(1) - 1).abs().max() < 1e-2
        assert rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
        assert turn_pairs(half, cos, cos).shape == (3, 2, 5, 8)
        assert turn_pairs(half, cos[0, :1], cos[0, :1]).shape == (1, 2, 5, 8)
        with pytest.raises(RuntimeError):
            turn_pairs(half, cos[0, :2], cos[0, :2])


def test_training_and_its_references_compute_alike() -> None:
    """DPO's reference log-probabilities are made without gradients: at step 0 they are the policy's, bit for bit."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    model, ids = Llama(config), torch.randint(0, 64, (2, 40))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            learned = model.hidden(ids)
            with torch.no_grad():
                assert torch.equal(model.hidden(ids), learned)
