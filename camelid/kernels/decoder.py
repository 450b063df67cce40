"""A whole LLaMA as one native call a step: tokens of any number of texts in, logits out.

What comes out does not depend on what else is in the call: not on the batch, not on how a prompt is cut into chunks,
not on the number of threads. The torch model is the reference; tests compare the two.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from camelid.kernels.library import library
from camelid.kernels.packed import BLOCK, KINDS, Packed, pointer

PAGE = 32  # tokens of a page of the cache
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEVELS = ("plain", "avx2", "avx512", "avx512_bf16", "amx", "amx_simulated", "neon")  # a simulated one: for tests


@dataclass(frozen=True)
class Shape:
    """What the library must know of a model; sizes as in LlamaConfig."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float

    def refusal(self) -> str | None:
        """Why the native decoder does not take this shape; None when it does."""
        if library() is None:
            return "the native library is not there"
        wide = (self.hidden_size, self.intermediate_size, self.num_attention_heads * self.head_dim)
        if any(n % BLOCK for n in wide):
            return f"a layer's width is not a multiple of {BLOCK}"
        if self.head_dim % 16 or self.head_dim > 256:
            return "head_dim is not a multiple of 16 up to 256"
        return None


@dataclass(frozen=True)
class LayerWeights:
    """One layer: matrices by their name in MATRICES, biases likewise where there are any, and the two norms."""

    matrices: Mapping[str, Packed]
    biases: Mapping[str, Tensor]
    attention_norm: Tensor
    mlp_norm: Tensor


@dataclass(frozen=True)
class Rows:
    """An embedding, contiguous: `values` [vocab, hidden] of a floating-point kind; or uint8 [vocab, hidden * bits / 8],
    `scale` float16 [vocab, hidden / group] and perhaps `least` like it, as `pack_integers` takes them."""

    kind: str
    values: Tensor
    scale: Tensor | None = None
    least: Tensor | None = None


@dataclass(frozen=True)
class Text:
    """A text's share of a step: how many tokens it feeds, the position of the first, and its pages from the beginning,
    with room for the new tokens."""

    tokens: int
    position: int
    pages: Sequence[int]


class Decoder:
    """The native model. `level` forces one of LEVELS instead of the CPU's best. Raises ValueError for one that the CPU
    does not have."""

    def __init__(
        self, shape: Shape, embedding: Rows, layers: Sequence[LayerWeights], final_norm: Tensor, head: Packed,
        threads: int, level: str | None = None,
    ) -> None:  # fmt: skip
        native = library()
        assert native is not None
        assert shape.refusal() is None
        self.shape, self._native, self._free = shape, native, native.camelid_decoder_free
        native.camelid_decoder_new.restype = ctypes.c_void_p
        sizes = (
            shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers, shape.num_attention_heads,
            shape.num_key_value_heads, shape.head_dim, shape.vocab_size,
        )  # fmt: skip
        made = native.camelid_decoder_new(
            (ctypes.c_int64 * 7)(*sizes), ctypes.c_float(shape.rms_norm_eps), ctypes.c_int(threads), _number(level)
        )
        if made is None:
            raise ValueError(f"this CPU does not have {level}")
        self._handle = ctypes.c_void_p(made)
        self._kept: list[Tensor] = []  # what the library points to
        for number, layer in enumerate(layers):
            for which, name in enumerate(MATRICES):
                self._set(number, which, layer.matrices[name], layer.biases.get(name))
            self._norm(number, 0, layer.attention_norm)
            self._norm(number, 1, layer.mlp_norm)
        self._set(-1, 0, head, None)
        self._norm(-1, 0, final_norm)
        self.likeliest: list[int] = []  # of the last step
        self._embedding = embedding
        groups = 1 if embedding.scale is None else embedding.scale.shape[1]
        native.camelid_decoder_embedding(
            self._handle, ctypes.c_int(KINDS.index(embedding.kind)), ctypes.c_int64(shape.hidden_size // groups),
            *(pointer(t) for t in (embedding.values, embedding.scale, embedding.least)),
        )  # fmt: skip
        self.weight_bytes = sum(t.nbytes for t in self._kept)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._free(self._handle)

    def page_bytes(self, kind: torch.dtype) -> int:
        """Of one layer's keys and values of PAGE tokens: float32, bfloat16, or int8 with a float32 for each head's key
        and each head's value."""
        head = self.shape.head_dim * kind.itemsize + (4 if kind == torch.int8 else 0)
        return 2 * PAGE * self.shape.num_key_value_heads * head

    def step(
        self, ids: Sequence[int], texts: Sequence[Text], wanted: Sequence[int], cos: Tensor, sin: Tensor, cache: Tensor,
        kind: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """Feed the texts' tokens `ids`, end to end. Returns logits float32 [wanted, vocab] of the tokens numbered in
        `wanted`; `likeliest` is then where each row is greatest, -1 where a score is no number. Raises IndexError for
        an id that the vocabulary has not.

        cos and sin: float32 [positions, head_dim / 2]. cache: uint8 [pages, layers, page_bytes] of `kind`, read and
        extended.
        """
        starts, at = [0], 0
        for text in texts:
            at += text.tokens
            starts.append(at)
        longest = max(len(text.pages) for text in texts)
        if min(ids) < 0 or max(ids) >= self.shape.vocab_size:
            raise IndexError(f"a token's id is not among 0 … {self.shape.vocab_size - 1}")
        _, layers, page_bytes = cache.shape
        numbers = array("q", [len(texts), at, longest, len(wanted), layers, page_bytes, KINDS.index(_name(kind))])
        numbers.extend(ids)
        numbers.extend(starts)
        numbers.extend([text.position for text in texts])
        for text in texts:
            numbers.extend(text.pages)
            numbers.extend([0] * (longest - len(text.pages)))
        numbers.extend(wanted)
        likeliest = array("q", [0]) * len(wanted)
        logits = torch.empty(len(wanted), self.shape.vocab_size, dtype=torch.float32, device="cpu")
        self._native.camelid_decoder_step(
            self._handle, ctypes.c_void_p(numbers.buffer_info()[0]), pointer(cos), pointer(sin), pointer(cache),
            pointer(logits), ctypes.c_void_p(likeliest.buffer_info()[0]),
        )  # fmt: skip
        self.likeliest = likeliest.tolist()
        return logits

    def states(self, tokens: int) -> Tensor:
        """The last step's states after the final norm, float32 [tokens, hidden]: of all its tokens."""
        out = torch.empty(tokens, self.shape.hidden_size, dtype=torch.float32, device="cpu")
        self._native.camelid_decoder_states(self._handle, ctypes.c_int64(tokens), pointer(out))
        return out

    def product(self, weight: Packed, by: Tensor) -> Tensor:
        """by float32 [tokens, columns] times the weight: float32 [tokens, rows]."""
        by = by.contiguous()
        out = torch.empty(len(by), weight.rows, dtype=torch.float32, device="cpu")
        self._native.camelid_decoder_product(
            self._handle, *weight.described(), pointer(by), ctypes.c_int64(len(by)), pointer(out)
        )
        return out

    def _set(self, layer: int, which: int, weight: Packed, bias: Tensor | None) -> None:
        self._kept += [weight.data] + ([] if bias is None else [bias])
        self._native.camelid_decoder_matrix(
            self._handle, ctypes.c_int64(layer), ctypes.c_int(which), *weight.described(),
            ctypes.c_void_p(None if bias is None else bias.data_ptr()),
        )  # fmt: skip

    def _norm(self, layer: int, which: int, weight: Tensor) -> None:
        self._kept.append(weight)
        self._native.camelid_decoder_norm(self._handle, ctypes.c_int64(layer), ctypes.c_int(which), pointer(weight))


def level(wanted: str | None = None) -> str:
    """Which of LEVELS this CPU's decoder is; "" when the library or the wanted level is not there."""
    native = library()
    if native is None:
        return ""
    native.camelid_decoder_level.restype = ctypes.c_char_p
    found: bytes = native.camelid_decoder_level(_number(wanted))
    return found.decode()


def _number(level: str | None) -> ctypes.c_int:
    return ctypes.c_int(-1 if level is None else LEVELS.index(level))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
