"""Read a SentencePiece `tokenizer.model` (BPE) and turn it into the one tokenizer.

The file is a protocol buffer (sentencepiece_model.proto); the few fields LLaMA uses are read here directly, so
opening a model needs no extra package. Equality with the sentencepiece library is tested on real text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import unpack_from
from typing import TYPE_CHECKING

from camelid.errors import FormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"


@dataclass(frozen=True)
class Piece:
    """One vocabulary entry; its index in the list is its id."""

    text: str
    score: float
    kind: int


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: varints as int, the rest as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, at = _varint(data, at)
        if size is None or size > len(data) - at:
            raise ValueError("a field ends past the end of the file")
        yield number, data[at : at + size]
        at += size


@dataclass(frozen=True)
class Model:
    """The part of a SentencePiece model that decides how text is cut."""

    pieces: list[Piece]
    add_dummy_prefix: bool


def read(path: Path) -> Model:
    """Read a model. Raises FormatError naming what is unsupported: it would cut text differently."""
    try:
        return _read(path.read_bytes())
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except (ValueError, IndexError, TypeError) as error:
        raise FormatError(f"{path} is not a SentencePiece model, or is damaged ({error})") from None


def texts_of(data: bytes) -> list[str]:
    """The pieces of a model file's bytes, by their ids."""
    return [piece.text for piece in _read(data).pieces]


def _read(data: bytes) -> Model:
    pieces: list[Piece] = []
    prefix, kind = True, 1
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text, score, piece_kind = "", 0.0, NORMAL
            for inner, content in _fields(value):
                if inner == 1 and isinstance(content, bytes):
                    text = content.decode("utf-8")
                elif inner == 2 and isinstance(content, bytes):
                    score = unpack_from("<f", content)[0]
                elif inner == 3 and isinstance(content, int):
                    piece_kind = content
            pieces.append(Piece(text, score, piece_kind))
        elif number == 2 and isinstance(value, bytes):  # trainer_spec
            kind = next((int(v) for n, v in _fields(value) if n == 3 and isinstance(v, int)), 1)
        elif number == 3 and isinstance(value, bytes):  # normalizer_spec
            rules = dict(_fields(value))
            prefix = bool(rules.get(3, 1))
            if rules.get(2) or rules.get(4, 1):
                raise FormatError("it normalises text or removes spaces; LLaMA's tokenizers keep text as it is")
    if not pieces:
        raise ValueError("it has no vocabulary")
    if kind != 2:
        raise FormatError("it is not a BPE model; LLaMA's tokenizers are")
    return Model(pieces, prefix)


def merges_of(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """The merge list that a SentencePiece BPE vocabulary stands for: best-scored piece first, every way to make it."""
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    ranked = []
    for index, piece in enumerate(pieces):
        if piece.kind != NORMAL or len(piece.text) < 2:
            continue
        ways = []
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in ids and right in ids:
                ways.append((ids[left], ids[right], left, right))
        ranked += [(-piece.score, index, a, b, left, right) for a, b, left, right in sorted(ways)]
    ranked.sort(key=lambda r: r[:4])
    return [(left, right) for *_, left, right in ranked]


def build(pieces: Sequence[Piece], *, add_dummy_prefix: bool) -> Backend:
    """The `tokenizers` pipeline equal to a SentencePiece BPE model with byte fallback."""
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend

    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise FormatError("two pieces of its vocabulary are the same")
    unknown = next((p.text for p in pieces if p.kind == UNKNOWN), None)
    fallback = any(p.kind == BYTE for p in pieces)
    backend = Backend(models.BPE(vocab, merges_of(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=fallback))
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    if add_dummy_prefix:
        steps.insert(0, normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    undo: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_dummy_prefix:
        undo.append(decoders.Strip(content=" ", left=1, right=0))
    backend.decoder = decoders.Sequence(undo)
    for kind, special in ((CONTROL, True), (UNKNOWN, True), (USER_DEFINED, False)):
        added = [AddedToken(p.text, normalized=False, special=special) for p in pieces if p.kind == kind]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    return backend


def add_bos(backend: Backend, token: str, token_id: int) -> None:
    """Put `token` before every text."""
    add_ends(backend, (token, token_id), None)


def add_ends(backend: Backend, bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> None:
    """Put a token (its text and id) before, and one after, every text."""
    if bos or eos:
        set_ends(backend, bos, eos)


def set_ends(backend: Backend, bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> None:
    """These and no others, whatever the tokenizer put there."""
    from tokenizers.processors import TemplateProcessing

    before, after = f"{bos[0]}:0 " if bos else "", f" {eos[0]}" if eos else ""
    backend.post_processor = TemplateProcessing(
        single=f"{before}$A:0{after and after + ':0'}", pair=f"{before}$A:0 $B:1{after and after + ':1'}",
        special_tokens=list(dict.fromkeys(end for end in (bos, eos) if end)),
    )  # fmt: skip


def append(data: bytes, names: Sequence[str], characters: int) -> bytes:
    """A model file with more pieces at its end: `characters` single ones first, then merges, the earlier the better.

    A protocol buffer's lists go on where another part of the file adds to them.
    """
    from struct import pack

    # Llama 2 has pieces of score -1e9, where a 32-bit float no longer tells neighbours apart: they stay the last.
    lowest = min(piece.score for piece in _read(data).pieces if piece.score > -1e8)
    merges = len(names) - characters
    for number, name in enumerate(names):
        rank = number - characters if number >= characters else merges + number
        text = name.encode("utf-8")
        piece = b"\x0a" + _to_varint(len(text)) + text + b"\x15" + pack("<f", lowest - 1 - rank)
        data += b"\x0a" + _to_varint(len(piece)) + piece
    return data


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
