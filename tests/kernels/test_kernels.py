"""Attention and the chunked loss against torch's own arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from camelid.kernels import attention as attending
from camelid.kernels import elementwise
from camelid.kernels.attention import Documents, attention
from camelid.kernels.cross_entropy import CHUNK_BYTES, linear_cross_entropy
from camelid.kernels.elementwise import rms_norm
from camelid.kernels.library import library
from camelid.kernels.memory import LARGE, large_pages

native = pytest.mark.skipif(library() is None, reason="the native library is not built here")


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_chunked_loss_and_gradients(z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("camelid.kernels.cross_entropy.CHUNK_BYTES", {"cpu": 7 * 50 * 8})  # several, the last one short
    torch.manual_seed(0)
    states, weight = torch.randn(40, 12).double(), torch.randn(50, 12).double()
    labels = torch.randint(0, 50, (40,))
    found = []
    for chunked in (True, False):
        s, w = states.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunked:
            loss = linear_cross_entropy(s, w, labels, z_loss)
        else:
            logits = s @ w.T
            loss = F.cross_entropy(logits, labels, reduction="sum") + z_loss * logits.logsumexp(1).square().sum()
        (loss / 3).backward()
        found.append((loss.detach(), s.grad, w.grad))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_a_share_of_the_loss_is_not_rounded() -> None:
    """1/3000 in bfloat16 is 0.136 % off, and so would all that lies below the loss be."""
    torch.manual_seed(0)
    states, weight = torch.randn(64, 32).bfloat16().requires_grad_(), torch.randn(50, 32).bfloat16().requires_grad_()
    found = []
    for count in (1, 3000):
        loss = linear_cross_entropy(states, weight, torch.arange(64) % 50) / count
        found.append([g.double() for g in torch.autograd.grad(loss, [states, weight])])
    for whole, share in zip(*found, strict=True):
        assert abs(float((whole * share).sum() / (whole * whole).sum()) * 3000 - 1) < 2e-4


def test_no_token_is_a_loss_of_zero() -> None:
    states, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(9, 4, requires_grad=True)
    loss = linear_cross_entropy(states, weight, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert (loss.item(), weight.grad is not None and float(weight.grad.abs().sum())) == (0.0, 0.0)


def test_the_number_of_tokens_makes_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps what it made for each shape of a product: a few shapes serve any number of tokens, and the rows that
    fill a chunk up count for nothing."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 100 * 50 * 8)
    shapes, mm = set(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **to: (shapes.add(tuple(a.shape)), mm(a, b, **to))[1])
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    for tokens in range(1, 300):
        states = torch.randn(tokens, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        labels = torch.randint(0, 50, (tokens,), generator=generator)
        found = linear_cross_entropy(states, weight, labels)
        wanted = F.cross_entropy(states @ weight.T, labels, reduction="sum")
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
        ours, theirs = (torch.autograd.grad(loss, (states, weight)) for loss in (found, wanted))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    rows = (32, 64, 96)  # never more than CHUNK_BYTES
    assert shapes == {(n, 4) for n in rows} | {(50, n) for n in rows}  # logits, and the weight's gradient


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 15, 16, 1000, 32003])
def test_softmax_gradient(dtype: torch.dtype, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits = (5 * torch.randn(9, vocab)).to(dtype)
    labels = torch.randint(0, vocab, (9,))
    ours, reference = logits.clone(), logits.clone()
    sums = elementwise.softmax_gradient_(ours, labels, 1e-3)
    monkeypatch.setattr(elementwise, "library", lambda: None)
    wanted = elementwise.softmax_gradient_(reference, labels, 1e-3)
    assert (sums - wanted).abs().max() < 1e-5
    assert (ours.float() - reference.float()).abs().max() < (2e-6 if dtype == torch.float32 else 5e-3)


@native
def test_softmax_gradient_hands_on_what_is_not_finite() -> None:
    for bad in (float("nan"), float("inf")):
        logits = torch.zeros(2, 40)
        logits[1, 7] = bad
        sums = elementwise.softmax_gradient_(logits, torch.tensor([3, 3]))
        assert torch.isfinite(sums[0])
        assert not torch.isfinite(sums[1])


def packed(batch: int, length: int) -> torch.Tensor:
    return torch.stack([torch.randint(0, 5, (length,)).sort().values for _ in range(batch)])


@native
@pytest.mark.parametrize("shape", [(2, 4, 2, 256, 48), (1, 2, 2, 100, 16), (2, 3, 1, 33, 64), (1, 4, 4, 2, 16),
                                   (1, 2, 1, 513, 128), (1, 1, 1, 64, 16), (3, 2, 2, 65, 32)])  # fmt: skip
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_its_gradients(
    shape: tuple[int, int, int, int, int], documents: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, heads, kv_heads, length, size = shape
    torch.manual_seed(0)
    inputs = [torch.randn(batch, length, n, size).to(dtype).transpose(1, 2) for n in (heads, kv_heads, kv_heads)]
    slope = torch.randn(batch, heads, length, size).to(dtype)
    mask = Documents(packed(batch, length)) if documents else None
    found = []
    for library_there, kind in ((True, dtype), (False, dtype), (False, torch.float64)):
        if not library_there:
            monkeypatch.setattr(attending, "library", lambda: None)
        q, k, v = (x.to(kind, copy=True).requires_grad_() for x in inputs)
        out = attention(q, k, v, mask)
        assert ("_NativeAttention" in type(out.grad_fn).__name__) == library_there
        out.backward(slope.to(kind))
        found.append([out.detach(), q.grad, k.grad, v.grad])
    for ours, theirs, exact in zip(*found, strict=True):
        if dtype == torch.float32:
            assert (ours - theirs).abs().max() < 2e-5
        error, usual = ((x.double() - exact).norm() for x in (ours, theirs))
        assert error < 1.5 * usual + 5e-6 * (1 + exact.norm())  # what torch's own attention in this dtype is off by


@native
def test_attention_of_bfloat16_where_products_are_float32() -> None:
    """As on a CPU that has no products of bfloat16: forward and backward are those of widened tensors, bit for bit, and
    rounded where bfloat16 is asked for."""
    torch.manual_seed(0)
    q, out, d_out = (torch.randn(1, 4, 70, 32).bfloat16() for _ in range(3))
    k, v = (torch.randn(1, 2, 70, 32).bfloat16() for _ in range(2))
    firsts, found = torch.zeros(1, 70, dtype=torch.int32), []
    for given in ([q, k, v], [q.float(), k.float(), v.float()]):
        sums, made = torch.empty(1, 4, 70), torch.empty(1, 4, 70, 32)
        attending._call(given[0], given[1], firsts, sums, [*given, made], backward=False)
        slopes = [
            torch.empty_like(t, dtype=torch.float32) for t in given
        ]  # not all are bfloat16, so products are float32
        more = [out, d_out] if given[0].dtype == torch.bfloat16 else [out.float(), d_out.float()]
        attending._call(given[0], given[1], firsts, sums, [*given, *more, *slopes], backward=True)
        found.append([sums, made, *slopes])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    wide = [q.float(), k, v]  # not all are bfloat16 here either
    made, slopes = torch.empty(1, 4, 70, 32).bfloat16(), [torch.empty_like(t) for t in (q, k, v)]
    attending._call(q, k, firsts, sums, [*wide, made], backward=False)
    attending._call(q, k, firsts, sums, [*wide, out, d_out, *slopes], backward=True)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip([made, *slopes], found[0][1:], strict=True))


@native
def test_what_is_no_number_stays_so() -> None:
    """Also one whose bits are all ones, which rounding to bfloat16 would carry over into zero."""
    worst = torch.tensor([[-1] * 40], dtype=torch.int32).view(torch.float32)
    q = torch.randn(1, 1, 20, 32).bfloat16()
    q[0, 0, 3, 5] = torch.nan
    with torch.autocast("cpu", torch.bfloat16):
        assert rms_norm(worst.requires_grad_(), torch.ones(40), 1e-5).isnan().all()
        leaves = [x.clone().requires_grad_() for x in (q, torch.randn_like(q), torch.randn_like(q))]
        out = attention(*leaves, None)
        found = torch.autograd.grad(out.sum(), leaves)
    assert out[0, 0, 3].isnan().all()
    assert all(x.isnan().any() for x in found)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("there", [True, False])
def test_a_neighbour_in_the_row_changes_no_bit(
    there: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two documents in one row: whatever the first holds, the second's outputs and gradients have the same bits."""
    if not there:
        monkeypatch.setattr(attending, "library", lambda: None)
    torch.manual_seed(0)
    ids = torch.tensor([[0] * 70 + [1] * 60])
    first = torch.randn(1, 2, 130, 32)
    second = first.clone()
    second[:, :, :70] = torch.randn(1, 2, 70, 32)
    found = []
    for values in (first, second):
        q, k, v = (values.to(dtype, copy=True).requires_grad_() for _ in range(3))
        out = attention(q, k, v, Documents(ids))
        out[:, :, 70:].square().sum().backward()
        found.append([t[:, :, 70:] for t in (out.detach(), q.grad, k.grad, v.grad) if t is not None])
        assert all(t.grad is not None and not t.grad[:, :, :70].any() for t in (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q = torch.randn(3, 4, 90, 32).to(dtype).requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = attention(q, q, q, None)
            found.append((out.detach(), torch.autograd.grad(out.sum(), q)[0]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_document_in_pieces_goes_by_the_mask() -> None:
    assert Documents(torch.tensor([[0, 0, 1, 0]])).firsts is None
    firsts = Documents(torch.tensor([[4, 4, 1, 1, -1]])).firsts
    assert firsts is not None
    assert firsts.tolist() == [[0, 0, 2, 2, 4]]


def test_large_pages_are_zeros_at_the_beginning_of_one() -> None:
    room = large_pages(3 * LARGE + 17)
    assert (room.dtype, room.shape, room.data_ptr() % LARGE) == (torch.uint8, (3 * LARGE + 17,), 0)
    assert not room.any()
    other = large_pages(LARGE)
    other.fill_(255)
    assert not room.any()
