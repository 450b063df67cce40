"""Bytes out of plain and compressed files, in pieces, with damage confined to where it is.

A file is a sequence of good chunks and breaks. After a break a gzip or bzip2 file goes on at its next member, so a
damaged record of a web archive does not cost its neighbours. A gzip member is handed out only when its checksum is
right, unless it is too large to hold.
"""

from __future__ import annotations

import bz2
import lzma
import mmap
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from camelid.corpus.document import MAX_RECORD_BYTES
from camelid.errors import MissingExtra

CHUNK = 1 << 20
SIP = 1 << 16  # read at once where a fault loses what was asked for with it
HELD_MEMBER = 16 * 2**20  # a gzip member up to this size is checked before it is handed out
BOMB_RATIO, BOMB_BYTES = 200, 256 * 2**20  # more than both: no text compresses like this


@dataclass(frozen=True)
class Break:
    """The stream is interrupted: why, and how many bytes of the file were passed over."""

    reason: str
    size: int


Pieces = Iterator[bytes | Break]


def pieces(path: Path, start: int = 0, end: int | None = None) -> Pieces:
    """The decompressed content of a file; `start` and `end` cut a plain file."""
    kind = compression(path)
    if kind is None:
        yield from _plain(path, start, end)
    else:
        yield from _within_bounds(OPENERS[kind](path), path.stat().st_size)


def compression(path: Path) -> str | None:
    """How a file is compressed, by its first bytes: "gzip", "bzip2", "xz", "zstd" or None."""
    with path.open("rb") as file:
        head = file.read(6)
    return next((name for name, magic in MAGIC.items() if head.startswith(magic)), None)


def _within_bounds(decoded: Pieces, stored: int) -> Pieces:
    """Stop a decompression bomb."""
    total = 0
    for piece in decoded:
        if isinstance(piece, bytes):
            total += len(piece)
            if total > BOMB_BYTES and total > BOMB_RATIO * stored:
                yield Break("decompression_bomb", len(piece))
                return
        yield piece


def _plain(path: Path, start: int, end: int | None) -> Pieces:
    with path.open("rb") as file:
        file.seek(start)
        left = (end if end is not None else path.stat().st_size) - start
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            left -= len(chunk)
            yield chunk


def _gzip(path: Path) -> Pieces:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 0
        while at < len(data):
            try:
                if data[at : at + 2] != b"\x1f\x8b":
                    raise zlib.error("not a member")
                at = yield from _member(data, at)
            except zlib.error:
                following = data.find(b"\x1f\x8b\x08", at + 1)
                end = following if following >= 0 else len(data)
                if data[at:end].strip(b"\0"):  # zeros only pad the last block of a tape
                    yield Break("broken_gzip_member", end - at)
                at = end


def _member(data: mmap.mmap, at: int) -> Generator[bytes, None, int]:
    """One gzip member from `at`; returns where the next begins. Raises zlib.error when it is damaged or cut."""
    decoder = zlib.decompressobj(31)
    held: list[bytes] | None = []
    size = 0
    while not decoder.eof:
        raw = decoder.unconsumed_tail or data[at : at + CHUNK]
        if not raw:
            raise zlib.error("the file ends inside a member")
        if not decoder.unconsumed_tail:
            at += len(raw)
        out = decoder.decompress(raw, CHUNK)
        size += len(out)
        if held is not None and size > HELD_MEMBER:
            yield from held
            held = None
        if held is None:
            yield out
        else:
            held.append(out)
    yield from held or ()
    return at - len(decoder.unused_data)


def _bzip2(path: Path) -> Pieces:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = 0
        while at < len(data):
            decoder, begin = bz2.BZ2Decompressor(), at
            try:
                while not decoder.eof:
                    raw = data[at : at + CHUNK] if decoder.needs_input else b""
                    if decoder.needs_input and not raw:
                        raise OSError("the file ends inside a stream")
                    at += len(raw)
                    yield decoder.decompress(raw, CHUNK)
                at -= len(decoder.unused_data)
            except OSError:
                following = data.find(b"BZh", begin + 1)
                at = following if following >= 0 else len(data)
                yield Break("broken_bzip2_stream", at - begin)


def _xz(path: Path) -> Pieces:
    with path.open("rb") as file:
        decoder = lzma.LZMADecompressor(memlimit=512 * 2**20)
        raw = file.read(CHUNK)
        try:
            while raw or not decoder.needs_input:
                yield decoder.decompress(raw if decoder.needs_input else b"", CHUNK)
                if decoder.eof:
                    raw = decoder.unused_data.lstrip(b"\0") or file.read(CHUNK)
                    decoder = lzma.LZMADecompressor(memlimit=512 * 2**20)
                elif decoder.needs_input:
                    raw = file.read(CHUNK)
                    if not raw:
                        raise lzma.LZMAError("the file ends inside a stream")
        except lzma.LZMAError:
            yield Break("broken_xz_stream", max(0, path.stat().st_size - file.tell()))


def _zstd(path: Path) -> Pieces:
    try:
        import pyarrow as pa
    except ImportError:
        raise MissingExtra("pyarrow", "data", "reading .zst files") from None
    with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, "zstd") as stream:
        held: list[bytes] = []
        broken = False
        while True:
            try:
                part = stream.read(SIP)
            except OSError:
                part, broken = b"", True
            held.append(part)
            if not part or len(held) * SIP >= CHUNK:
                yield b"".join(held)
                held = []
            if not part:
                break
        if broken:  # still inside: the stream closes the file with itself
            yield Break("broken_zstd_frame", max(0, path.stat().st_size - file.tell()))


MAGIC = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ\0", "zstd": b"\x28\xb5\x2f\xfd"}
OPENERS: dict[str, Callable[[Path], Pieces]] = {"gzip": _gzip, "bzip2": _bzip2, "xz": _xz, "zstd": _zstd}


class Stream:
    """Reads lines and blocks from consecutive good chunks; it ends at a break, which is then in `fault`."""

    def __init__(self, source: Pieces) -> None:
        self._source = source
        self._buffer = b""
        self._at = 0
        self.fault: Break | None = None
        self.exhausted = False

    def _more(self) -> bool:
        """Append the next chunk to what is left of the buffer."""
        if self.fault or self.exhausted:
            return False
        piece = next(self._source, None)
        if piece is None:
            self.exhausted = True
            return False
        if isinstance(piece, Break):
            self.fault = piece
            return False
        self._buffer = self._buffer[self._at :] + piece
        self._at = 0
        return True

    def line(self, limit: int = MAX_RECORD_BYTES) -> tuple[bytes, int]:
        """(line with its newline, its size); (b"", size) for one longer than `limit`, (b"", 0) at the end."""
        seen = 0
        while (at := self._buffer.find(b"\n", self._at + seen)) < 0:
            seen = len(self._buffer) - self._at
            if seen > limit:
                return b"", self._rest_of_line()
            if not self._more():
                return self._cut(len(self._buffer)), seen
        size = at + 1 - self._at
        line = self._cut(at + 1)
        return (line if size <= limit else b""), size

    def _rest_of_line(self) -> int:
        size = 0
        while (at := self._buffer.find(b"\n", self._at)) < 0:
            size += len(self._buffer) - self._at
            self._at = len(self._buffer)
            if not self._more():
                return size
        size += at + 1 - self._at
        self._at = at + 1
        return size

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""
        parts: list[bytes] = []
        while size > 0 and (self._at < len(self._buffer) or self._more()):
            part = self._cut(min(len(self._buffer), self._at + size))
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def skip(self, size: int) -> int:
        """Pass over `size` bytes without holding them; returns how many there were."""
        done = 0
        while done < size and (part := self.read(min(CHUNK, size - done))):
            done += len(part)
        return done

    def peek(self, size: int) -> bytes:
        """The next `size` bytes without taking them, fewer at the end."""
        while len(self._buffer) - self._at < size and self._more():
            pass
        return self._buffer[self._at : self._at + size]

    def unread(self, data: bytes) -> None:
        """Give back what was read last."""
        self._buffer = data + self._buffer[self._at :]
        self._at = 0

    def _cut(self, end: int) -> bytes:
        part = self._buffer[self._at : end]
        self._at = end
        return part


def streams(source: Pieces) -> Iterator[Stream]:
    """The file as one stream per unbroken stretch; look at `fault` after each."""
    while True:
        stream = Stream(source)
        yield stream
        stream.skip(1 << 62)  # whatever the caller left
        if stream.fault is None:
            return
