"""Raw documents out of files: text, Markdown, source, HTML, JSON lines (plain or gzip) and parquet."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from camelid.errors import InputError, MissingExtra

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py"}
HTML_SUFFIXES = {".html", ".htm"}
SUFFIXES = TEXT_SUFFIXES | HTML_SUFFIXES | {".jsonl", ".gz", ".parquet"}


@dataclass(frozen=True)
class Document:
    """One text and where it came from ("path" or "path:line"). `fault` says why it could not be read, if so."""

    source: str
    text: str
    size: int
    fault: str | None = None


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """Every file that the inputs (files, folders, globs) name, sorted. Raises InputError for one that names none."""
    found: list[Path] = []
    for item in inputs:
        path = Path(item).expanduser()
        if path.is_dir():
            files = [p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in SUFFIXES]
        elif path.is_file():
            if path.suffix.lower() not in SUFFIXES:
                raise InputError(f"{path}: unknown kind of file; camelid reads {', '.join(sorted(SUFFIXES))}")
            files = [path]
        else:
            files = [p for p in Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))) if p.is_file()]
        if not files:
            raise InputError(f"no readable file at {item} (kinds read: {', '.join(sorted(SUFFIXES))})")
        found += sorted(files)
    return list(dict.fromkeys(found))


def read(path: Path) -> Iterator[Document]:
    """The documents of one file. A record that cannot be read comes back with its `fault`, never silently lost."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    raw = path.read_bytes()
    if suffix == ".gz":
        try:
            raw, suffix = gzip.decompress(raw), Path(path.stem).suffix.lower()
        except (OSError, EOFError):
            yield Document(str(path), "", len(raw), "damaged_gzip")
            return
    if suffix == ".jsonl":
        yield from _json_lines(path, raw)
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        yield Document(str(path), "", len(raw), "not_utf8")
        return
    yield Document(str(path), html_text(text) if suffix in HTML_SUFFIXES else text, len(raw))


def _json_lines(path: Path, raw: bytes) -> Iterator[Document]:
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            record: Any = json.loads(line)
            text = record["text"]
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            yield Document(source, "", len(line), "no_text_field")
        else:
            yield Document(source, text, len(line))


def _parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtra("pyarrow", "data", "reading parquet") from None
    try:
        file = pq.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise InputError(f"{path} has no column 'text' (it has {', '.join(file.schema_arrow.names)})")
        row = 0
        for batch in file.iter_batches(columns=["text"], batch_size=256):
            for text in batch.column(0).to_pylist():
                row += 1
                yield Document(f"{path}:{row}", text or "", len((text or "").encode()))
    except OSError as error:
        raise InputError(f"{path} is not parquet, or is damaged ({error})") from None


class _Visible(HTMLParser):
    """Collects the text a reader would see, one line per block."""

    HIDDEN = frozenset({"script", "style", "head", "nav", "template", "noscript"})
    BLOCKS = frozenset({"p", "div", "li", "br", "tr", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "section", "article"})

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in self.HIDDEN
        if tag in self.BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(0, self.hidden - (tag in self.HIDDEN))
        if tag in self.BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.pieces.append(data)


def html_text(page: str) -> str:
    """The visible text of a page, without boilerplate detection."""
    parser = _Visible()
    parser.feed(page)
    lines = (" ".join(line.split()) for line in "".join(parser.pieces).splitlines())
    return "\n".join(line for line in lines if line)
