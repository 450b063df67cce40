"""Records out of one unbroken stretch of bytes: plain text, HTML, JSON, JSON lines, CSV, parquet.

Every reader yields documents whose sizes add up to the bytes it consumed.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from camelid.corpus.bytestream import Stream
from camelid.corpus.decode import Undecodable, declared_in_page, decode, decode_line, encoding_of
from camelid.corpus.document import MAX_RECORD_BYTES, Document, Kind
from camelid.disk import is_json
from camelid.errors import InputError, MissingExtra

PART_BYTES = 8 * 2**20  # a longer text is cut into documents of about this size, at the end of a line
HEAD = 64 * 2**10  # of a file of lines, by which its encoding is told
TEXT_FIELDS = ("text", "content", "body", "raw_content", "article", "document", "paragraphs")
TITLE_FIELDS = ("title",)


def read_text(stream: Stream, source: str, kind: Kind, encoding: str | None) -> Iterator[Document]:
    """A text file: one document, or several parts when it is long."""
    head = stream.peek(4096)
    wide = head.startswith((b"\xff\xfe", b"\xfe\xff")) or head.count(0) > len(head) // 20
    part_bytes = MAX_RECORD_BYTES if wide else PART_BYTES  # two-byte encodings cannot be cut at a newline byte
    number = 0
    while raw := stream.read(part_bytes):
        rest, size = (b"", 0) if wide else stream.line()
        number += 1
        name = source if number == 1 and not stream.peek(1) else f"{source}#{number}"
        if size and not rest:
            yield Document(name, len(raw) + size, fault="line_too_long")
        else:
            yield decoded(name, raw + rest, kind, encoding, len(raw) + size)


def read_page(stream: Stream, source: str, kind: Kind, encoding: str | None) -> Iterator[Document]:
    """An HTML file: one page."""
    raw = stream.read(MAX_RECORD_BYTES)
    more = stream.skip(1 << 62)
    if more:
        yield Document(source, len(raw) + more, fault="too_long")
    elif raw:
        yield decoded(source, raw, "html", encoding or declared_in_page(raw), len(raw))


def decoded(source: str, raw: bytes, kind: Kind, encoding: str | None, size: int) -> Document:
    """A document of these bytes, or its fault."""
    try:
        return Document(source, size, decode(raw, encoding), kind)
    except Undecodable as error:
        return Document(source, size, fault=str(error))


def read_json_lines(stream: Stream, source: str, field: str) -> Iterator[Document]:
    """One JSON object a line. A line that is none is quarantined by itself."""
    number, encoding = 0, encoding_of(stream.peek(HEAD))
    while True:
        line, size = stream.line()
        if not size:
            return
        number += 1
        name = f"{source}:{number}"
        if not line:
            yield Document(name, size, fault="line_too_long")
        elif not line.strip():
            yield Document(name, size, skip="blank_line")
        elif not line.endswith(b"\n") and stream.fault:
            yield Document(name, size, fault="cut_record")
        else:
            yield _json_record(name, line, size, field, encoding)


def _json_record(name: str, line: bytes, size: int, field: str, encoding: str | None) -> Document:
    try:
        record = json.loads(decode_line(line, encoding))
    except Undecodable as error:
        return Document(name, size, fault=str(error))
    except (ValueError, RecursionError):
        return Document(name, size, fault="bad_json")
    return from_record(name, record, size, field)


def read_json(stream: Stream, source: str, field: str) -> Iterator[Document]:
    """A JSON array of records, or one record; or, as some name them, JSON lines. The file is read whole."""
    raw = stream.read(MAX_RECORD_BYTES)
    if stream.peek(1) and raw.removeprefix(codecs.BOM_UTF8).startswith(b"{") and is_json(raw.partition(b"\n")[0]):
        stream.unread(raw)
        yield from read_json_lines(stream, source, field)
        return
    if more := stream.skip(1 << 62):
        yield Document(source, len(raw) + more, fault="too_long")
        return
    try:
        value = json.loads(decode(raw))
    except Undecodable as error:
        yield Document(source, len(raw), fault=str(error))
        return
    except (ValueError, RecursionError):
        if is_json(raw.partition(b"\n")[0]):
            yield from read_json_lines(Stream(iter([raw])), source, field)
        else:
            yield Document(source, len(raw), fault="bad_json")
        return
    records = value if isinstance(value, list) else [value]
    left = len(raw)
    for number, record in enumerate(records, 1):
        # A record's share of the file is what it takes up when written again; the last takes what remains.
        share = len(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace"))
        size = left if number == len(records) else min(left, share)
        left -= size
        yield from_record(f"{source}:{number}", record, size, field)


def from_record(name: str, record: Any, size: int, field: str) -> Document:
    """The text of a JSON object: the named field, or with "auto" the first usual one; a list is joined by lines."""
    if isinstance(record, Mapping):
        fields = TEXT_FIELDS if field == "auto" else (field,)
        given = [record[f] for f in fields if record.get(f) is not None]
        filled = (v for v in given if v and isinstance(v, str | list))  # an empty one is no text
        value = next(filled, given[0] if given else None)
        if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            title = next((record[f] for f in TITLE_FIELDS if isinstance(record.get(f), str)), None)
            value = "\n".join([title, *value] if title else value)
        if isinstance(value, str):
            return Document(name, size, whole(value))
    return Document(name, size, fault="no_text_field")


def whole(text: str) -> str:
    """Text without lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def read_csv(stream: Stream, source: str, field: str, delimiter: str) -> Iterator[Document]:
    """Rows of a table with a header; a quoted field may hold newlines. A row with a line that is too long, or no text,
    is quarantined by itself."""
    taken, readable, encoding = 0, True, encoding_of(stream.peek(HEAD))

    def lines() -> Iterator[str]:
        nonlocal taken, readable
        while True:
            line, size = stream.line()
            if not size:
                return
            taken += size
            text = ""
            try:
                text = decode_line(line, encoding).replace("\0", "")
            except Undecodable:  # not let out: it would end the lines
                readable = False
            readable = readable and bool(line)
            yield text

    csv.field_size_limit(MAX_RECORD_BYTES)
    quoted = delimiter != "\t" or _quotes(stream.peek(HEAD))
    rows = csv.reader(lines(), delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
    field = field if field == "auto" else field.strip().lower()
    header: list[str] | None = None
    number = 0
    while True:
        number += 1
        name, taken, readable = f"{source}:{number}", 0, True
        try:
            row = next(rows, None)
        except csv.Error:
            yield Document(name, taken, fault="bad_csv")
            continue
        if row is None:
            return
        if not readable:
            yield Document(name, taken, fault="bad_csv")
        elif header is None:
            header = [cell.strip().lower() for cell in row]
            yield Document(name, taken, skip="header")
        elif len(row) != len(header):
            yield Document(name, taken, fault="bad_csv")
        else:
            yield from_record(name, dict(zip(header, row, strict=True)), taken, field)


def _quotes(head: bytes) -> bool:
    """Whether a .tsv that begins so quotes its fields, as csv writers do; in others a quote is a letter."""
    lines = head[: head.rfind(b"\n") + 1].decode("latin-1").splitlines()
    opened = [field for line in lines for field in line.split("\t") if field.startswith('"')]
    if all(re.fullmatch(r'"(?:[^"]|"")*"', field) for field in opened):
        return bool(opened)
    return any(line.count("\t") != lines[0].count("\t") for line in lines)  # a quoted field goes on in the next line


def _cells(column: Any) -> list[Any]:
    """A column's values; the bytes of a string that is not UTF-8, which a file may hold all the same."""

    def value(cell: Any) -> Any:
        try:
            return cell.as_py()
        except UnicodeDecodeError:
            raw = cell.as_buffer() if hasattr(cell, "as_buffer") else None
            return raw.to_pybytes() if raw else b""

    try:
        found: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        found = [value(cell) for cell in column]
    return found


def read_parquet(path: Path, field: str) -> Iterator[Document]:
    """Rows of a parquet file; a record's size is its text's, the other columns are not read."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtra("pyarrow", "data", "reading parquet") from None
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = next((f for f in (TEXT_FIELDS if field == "auto" else (field,)) if f in names), None)
            if column is None:
                raise InputError(
                    f"{path} has no column {'text' if field == 'auto' else field!r} (it has {', '.join(names)}): "
                    "name one with text_field=…"
                )
            for batch in file.iter_batches(columns=[column], batch_size=256):
                for text in _cells(batch.column(0)):
                    row += 1
                    raw = text.encode("utf-8", "replace") if isinstance(text, str) else text or b""
                    size = len(raw) if isinstance(raw, bytes) else 0
                    if size > MAX_RECORD_BYTES:
                        yield Document(f"{path}:{row}", size, fault="too_long")
                    elif isinstance(text, bytes):
                        yield decoded(f"{path}:{row}", text, "text", None, size)
                    else:
                        yield from_record(f"{path}:{row}", {"text": text}, size, "text")
    except (OSError, pa.ArrowException):
        yield Document(f"{path}:{row + 1}", path.stat().st_size if not row else 0, fault="broken_parquet")
