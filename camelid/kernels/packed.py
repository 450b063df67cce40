"""Weights in the native library's own layout (native/decoder.hpp), and their products, for generating on a CPU.

Weights in int8 and int4 meet activations rounded to int8 by blocks of 32: bytes times bytes, exact, then one scale of
the weights and one of the activations. `rounded` is that rounding, for the torch path, which then gives the same
numbers to float32's last digits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from camelid.kernels.library import library
from camelid.kernels.memory import large_pages, let_go

PLAIN = (Tensor, nn.Parameter, FakeTensor)  # a subclass's numbers may lie elsewhere, or not be there yet
LINE = 64  # bytes of the cache's
BLOCK = 32  # activations that share a scale; columns of a packed matrix are a multiple of it
LEAST = 1e-30  # of a block's greatest value: below, its 127th part could not be divided by
KINDS = ("float32", "float16", "bfloat16", "int8", "int4")
PANEL, PIECE = 32, 8 << 20  # rows that lie together; bytes of a weight that is lost piece by piece
MIDDLE, BYTES, LEASTS = range(3)  # what says which number of a group means nothing (native/decoder.hpp)


@dataclass(frozen=True)
class Packed:
    """A weight [rows, columns]: `data` uint8, aligned to a cache line, of a `kind` among KINDS; `zero` is MIDDLE, BYTES
    or LEASTS."""

    kind: str
    rows: int
    columns: int
    group: int
    zero: int
    data: Tensor

    def described(self) -> tuple[ctypes._SimpleCData[int] | ctypes.c_void_p, ...]:
        """kind, rows, columns, group, zero, data: as the library's functions take them."""
        return (
            ctypes.c_int(KINDS.index(self.kind)),
            *(ctypes.c_int64(n) for n in (self.rows, self.columns, self.group)),
            ctypes.c_int(self.zero),
            ctypes.c_void_p(self.data.data_ptr()),
        )


class Room:
    """Memory for matrices, one after the other in the order in which they are asked for and will be read."""

    CHUNK = 256 << 20  # bytes that are taken from the system at a time; what is not used costs nothing

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8, device="cpu")

    def take(self, size: int) -> Tensor:
        """uint8 [size] that begins at a cache line."""
        lines = -(-size // LINE) * LINE
        if len(self._rest) < lines:
            self._rest = large_pages(max(lines, self.CHUNK))
        found, self._rest = self._rest[:size], self._rest[lines:]
        return found


def pack(weight: Tensor, kind: str, room: Room | None = None, lose: bool = False) -> Packed:
    """A weight [rows, columns] in float32, float16 or bfloat16. A bfloat16 weight becomes a float32 one without
    change. With `lose` the weight's own memory goes as it is packed, and its numbers with it."""
    weight, wanted = weight.detach().cpu(), getattr(torch, kind)
    if weight.dtype != wanted and (weight.dtype != torch.bfloat16 or kind == "float16"):
        weight = weight.to(wanted)
    weight = weight.contiguous()
    rows, columns = weight.shape
    packed = _empty(kind, rows, columns, columns, MIDDLE, room or Room())
    for part, out in _pieces(packed, weight, lose):
        _native().camelid_pack_floats(
            ctypes.c_int(KINDS.index(kind)), pointer(weight[part]), ctypes.c_int(weight.itemsize == 2),
            ctypes.c_int64(len(weight[part])), ctypes.c_int64(columns), out, ctypes.c_int(torch.get_num_threads()),
        )  # fmt: skip
    return packed


def pack_integers(
    q: Tensor, scale: Tensor, zero: Tensor | None, bits: int, room: Room | None = None, least: Tensor | None = None,
    lose: bool = False,
) -> Packed:  # fmt: skip
    """scale * (q - zero): q uint8 [rows, columns * bits / 8], of 4 bits two a byte, the even column low; scale float16
    [rows, columns / group], or a dtype into which a model was cast; zero uint8 like it, None for 2^(bits - 1). Or, of 4
    bits, scale * q + least, which is like scale. With `lose` q's own memory goes as it is packed, and its numbers with
    it. Raises ValueError for other integers, or groups that are not multiples of BLOCK."""
    q, scale, zero = q.contiguous(), scale.half().contiguous(), None if zero is None else zero.contiguous()
    least = None if least is None else least.half().contiguous()
    rows, columns = q.shape[0], q.shape[1] * 8 // bits
    group = columns // scale.shape[1]
    if group % BLOCK:
        raise ValueError(f"groups of {group} are not multiples of {BLOCK}")
    if any(t is not None and t.dtype != torch.uint8 for t in (q, zero)):
        raise ValueError("q and zero must be in bytes")
    if least is not None and (bits != 4 or zero is not None):
        raise ValueError("least values are of four bits without zeros")
    how = LEASTS if least is not None else MIDDLE if zero is None else BYTES
    offsets = zero if least is None else least
    packed = _empty(f"int{bits}", rows, columns, group, how, room or Room())
    for part, out in _pieces(packed, q, lose):
        _native().camelid_pack_integers(
            ctypes.c_int(KINDS.index(packed.kind)), pointer(q[part]), pointer(scale[part]), ctypes.c_int(how),
            pointer(None if offsets is None else offsets[part]), ctypes.c_int64(len(q[part])),
            ctypes.c_int64(columns), ctypes.c_int64(group), out, ctypes.c_int(torch.get_num_threads()),
        )  # fmt: skip
    return packed


def round_symmetric(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor] | None:
    """q and scale as `pack_integers` takes them, without zeros, rounded to nearest by the native library, which gives
    the bits of `model.quantized.round_to_nearest`; None where it cannot, and for a weight that is not finite."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    real = weight.device.type == "cpu" and weight.dtype in dtypes and not isinstance(weight, FakeTensor)
    native = library()
    if native is None or not real:
        return None
    weight = weight.detach().contiguous()
    rows, columns = weight.shape
    q = torch.empty(rows, columns * bits // 8, dtype=torch.uint8, device="cpu")
    scale = torch.empty(rows, columns // group, dtype=torch.float16, device="cpu")
    finite = native.camelid_round(
        ctypes.c_void_p(weight.data_ptr()), ctypes.c_int(dtypes.index(weight.dtype)), ctypes.c_int64(rows),
        ctypes.c_int64(columns), ctypes.c_int64(group), ctypes.c_int(bits), ctypes.c_void_p(q.data_ptr()),
        ctypes.c_void_p(scale.data_ptr()), ctypes.c_int(torch.get_num_threads()),
    )  # fmt: skip
    return (q, scale) if finite else None


def rounded(x: Tensor) -> Tensor:
    """x [..., columns] as int8 products see it: rint(x * 127 / max |x|) of each block of 32 values, times max |x| /
    127; zero where all are below 1e-30. float32 in between; x's dtype comes back."""
    q, worth = _whole(x.float().view(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK))
    back: Tensor = q.mul_(worth).flatten(-2).to(x.dtype)
    return back


def as_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., n] as int8 [..., n] and what one is worth, float32 [..., 1], no number where x has one that is none: the
    rounding of `rounded` with all of the last dimension as one block."""
    q, worth = _whole(x.float())
    return q.nan_to_num_(0).to(torch.int8), worth


def _whole(blocks: Tensor) -> tuple[Tensor, Tensor]:
    most = blocks.abs().amax(-1, keepdim=True)
    most = torch.where(most < LEAST, 0.0, most)
    return (blocks * torch.where(most > 0, 127.0 / most, 0.0)).round_(), most / 127.0


def _empty(kind: str, rows: int, columns: int, group: int, zero: int, room: Room) -> Packed:
    native = _native()
    native.camelid_packed_bytes.restype = ctypes.c_int64
    size = native.camelid_packed_bytes(
        ctypes.c_int(KINDS.index(kind)), *(ctypes.c_int64(n) for n in (rows, columns, group)), ctypes.c_int(zero)
    )
    return Packed(kind, rows, columns, group, zero, room.take(size))


def _pieces(packed: Packed, weight: Tensor, lose: bool) -> Iterator[tuple[slice, ctypes.c_void_p]]:
    """All rows of a weight at once, or so many panels of it at a time as are lost together; and where they go to."""
    rows, panel_bytes = len(weight), packed.data.nbytes // -(-packed.rows // PANEL)
    step = max(1, PIECE // (weight[:1].nbytes * PANEL)) * PANEL if lose else rows
    for start in range(0, rows, step):
        part = slice(start, start + step)
        yield part, ctypes.c_void_p(packed.data.data_ptr() + start // PANEL * panel_bytes)
        if lose:
            let_go(weight[part])


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's numbers are, as the library's functions take it; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _native() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None, "ask library() first"
    return loaded
