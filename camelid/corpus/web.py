"""Records of web archives: WARC (ISO 28500), its predecessor ARC, and WET.

Every record is an island: a wrong length, a cut body or a damaged member costs that record and no other.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

from camelid.corpus.bytestream import Stream
from camelid.corpus.decode import declared_in_page
from camelid.corpus.document import MAX_RECORD_BYTES, Document
from camelid.corpus.records import decoded

MAX_HEADER_LINES = 400
Headers = dict[str, str]


def read_warc(stream: Stream, source: str) -> Iterator[Document]:
    """The records of a WARC, WET or ARC stretch."""
    number = 0
    while head := stream.peek(1):
        number += 1
        if head in (b"\r", b"\n"):
            yield Document(f"{source}:{number}", stream.line()[1], skip="blank_line")
        elif stream.peek(5) == b"WARC/":
            yield _record(stream, source, number)
        elif _is_arc(stream):
            yield _arc_record(stream, source, number)
        else:
            yield Document(f"{source}:{number}", _resync(stream), fault="bad_warc_header")


def _is_arc(stream: Stream) -> bool:
    """An ARC header line: URL, IP, date, type, length."""
    words = stream.peek(4096).split(b"\n", 1)[0].split(b" ")
    return len(words) == 5 and words[2].isdigit() and words[4].strip().isdigit() and b":" in words[0]


def _resync(stream: Stream) -> int:
    """Pass over lines up to the next record's first; returns how many bytes that was."""
    size = stream.line()[1]
    while (head := stream.peek(5)) and head != b"WARC/" and not _is_arc(stream):
        size += stream.line()[1]
    return size


def _record(stream: Stream, source: str, number: int) -> Document:
    headers, size = _headers(stream)
    uri = headers.get("warc-target-uri", "").strip("<>")
    name = f"{source}:{number} {uri}".rstrip()
    length = _number(headers.get("content-length", ""))
    if length is None:
        return Document(name, size + _resync(stream), fault="bad_content_length")
    if length > MAX_RECORD_BYTES:
        passed = stream.skip(length)
        return Document(name, size + passed + _blank(stream), fault="too_long" if passed == length else "cut_record")
    body = stream.read(length)
    swallowed = body.find(b"\r\n\r\nWARC/1.")  # the length lies: the next record lies inside
    if swallowed >= 0:
        stream.unread(body[swallowed:])
        return Document(name, size + swallowed + _blank(stream), fault="bad_content_length")
    size += len(body)
    if len(body) < length:
        return Document(name, size, fault="cut_record")
    if stream.peek(1) not in (b"", b"\r", b"\n"):  # the length lies: the body goes on
        return Document(name, size + _resync(stream), fault="bad_content_length")
    return _page(name, headers, body, size + _blank(stream))


def _number(text: str) -> int | None:
    """A length or a status; None for what is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def _headers(stream: Stream) -> tuple[Headers, int]:
    """Header fields by lower-case name, and their size. A folded or odd line is passed over."""
    found: Headers = {}
    size = 0
    for _ in range(MAX_HEADER_LINES):
        line, taken = stream.line(1 << 16)
        size += taken
        if not line.strip():
            break
        key, colon, value = line.decode("utf-8", "replace").partition(":")
        if colon:
            found[key.strip().lower()] = value.strip()
    return found, size


def _blank(stream: Stream) -> int:
    """Pass over the blank lines that end a record."""
    size = 0
    while stream.peek(1) in (b"\r", b"\n"):
        size += stream.line()[1]
    return size


def _arc_record(stream: Stream, source: str, number: int) -> Document:
    line, size = stream.line()
    uri, _, _, kind, declared = line.decode("utf-8", "replace").split(" ")
    name, length = f"{source}:{number} {uri}", _number(declared.strip())
    if length is None:
        return Document(name, size + _resync(stream), fault="bad_content_length")
    if length > MAX_RECORD_BYTES:
        return Document(name, size + stream.skip(length) + _blank(stream), fault="too_long")
    body = stream.read(length)
    size += len(body)
    if len(body) < length:
        return Document(name, size, fault="cut_record")
    size += _blank(stream)
    if uri.startswith(("filedesc:", "dns:")):
        return Document(name, size, skip="not_a_page")
    headers = {"warc-type": "response", "content-type": "application/http" if body.startswith(b"HTTP/") else kind}
    return _page(name, headers, body, size)


def _page(name: str, headers: Headers, body: bytes, size: int) -> Document:
    """The document inside a complete record."""
    kind = headers.get("warc-type", "")
    if kind == "conversion":  # WET: text that was already taken out of a page
        return decoded(name, body, "web", "utf-8", size)
    if kind not in ("response", "resource"):
        return Document(name, size, skip="not_a_page")
    content_type = headers.get("content-type", "")
    if "application/http" in content_type:
        response = _http(body)
        if response is None:
            return Document(name, size, fault="bad_http_response")
        status, fields, body = response
        if status != 200:
            return Document(name, size, skip="http_status")
        content_type = fields.get("content-type", "text/html")
    media, _, parameters = content_type.lower().partition(";")
    charset = parameters.partition("charset=")[2].split(";")[0].strip(" \"'") or None
    if media.strip() in ("text/html", "application/xhtml+xml"):
        return decoded(name, body, "html", charset or declared_in_page(body), size)
    if media.strip() == "text/plain":
        return decoded(name, body, "web", charset, size)
    return Document(name, size, skip="not_text")


def _http(raw: bytes) -> tuple[int, Headers, bytes] | None:
    """(status, fields, body) of a stored HTTP response; None when it is none, or its coding cannot be undone."""
    head, blank, body = raw.partition(b"\r\n\r\n")
    if not blank:
        head, blank, body = raw.partition(b"\n\n")
    first, *rest = head.decode("latin-1").splitlines() or [""]
    words = first.split(" ")
    status = _number(words[1]) if first.startswith("HTTP/") and len(words) > 1 else None
    if status is None:
        return None
    fields = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in rest)}
    if "chunked" in fields.get("transfer-encoding", "").lower():
        body = _unchunk(body)
    coding = fields.get("content-encoding", "identity").lower()
    if coding in ("gzip", "x-gzip", "deflate"):
        unpacked = _unzip(body)
        return None if unpacked is None else (status, fields, unpacked)
    return (status, fields, body) if coding in ("identity", "") else None


def _unchunk(body: bytes) -> bytes:
    """HTTP/1.1 chunks joined. Crawlers sometimes store the body joined but keep the header; then it is returned."""
    parts: list[bytes] = []
    at = 0
    while (line_end := body.find(b"\n", at)) >= 0:
        digits = body[at:line_end].split(b";")[0].strip()
        if not re.fullmatch(rb"[0-9a-fA-F]{1,15}", digits):
            return b"".join(parts) if parts else body
        size = int(digits, 16)
        if size == 0:
            break
        parts.append(body[line_end + 1 : line_end + 1 + size])
        at = line_end + 1 + size
        at += 2 if body[at : at + 2] == b"\r\n" else 1
    return b"".join(parts) if parts else body


def _unzip(body: bytes) -> bytes | None:
    if body[:2] != b"\x1f\x8b" and body.lstrip()[:1] == b"<":
        return body  # stored unpacked under a header that says packed
    for window in (47, -15):  # gzip or zlib, then raw deflate
        decoder = zlib.decompressobj(window)
        try:
            return decoder.decompress(body, MAX_RECORD_BYTES)
        except zlib.error:
            continue
    return None
