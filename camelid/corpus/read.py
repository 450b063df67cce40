"""Which files an input names, what kind each is, and its documents.

The compression is told by a file's first bytes, the format by its name or, where the name says little, by the first
bytes of the content: downloads are often misnamed.
"""

from __future__ import annotations

import codecs
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from camelid.artifact import MANIFEST, read_manifest
from camelid.corpus.bytestream import Break, Pieces, Stream, compression, pieces, streams
from camelid.corpus.document import Document
from camelid.corpus.records import read_csv, read_json, read_json_lines, read_page, read_parquet, read_text
from camelid.corpus.web import read_warc
from camelid.corpus.wiki import read_wiki
from camelid.errors import InputError

COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
FORMATS = {
    ".txt": "text", ".text": "text", ".md": "text", ".rst": "text", ".tex": "text", ".org": "text", ".log": "text",
    ".html": "html", ".htm": "html", ".xhtml": "html",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".warc": "warc", ".arc": "warc", ".wet": "warc", ".xml": "wiki",
}  # fmt: skip
CODE = {
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt", ".scala", ".swift", ".js",
    ".ts", ".jsx", ".tsx", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".sh", ".sql", ".css",
}  # fmt: skip
FORMATS |= dict.fromkeys(CODE, "code")
# UTF-32's mark begins with UTF-16's.
WIDE = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
CUTTABLE = {"text", "code", "jsonl"}  # a plain file of these may be read from any line on


@dataclass(frozen=True, order=True)
class Span:
    """A file, or the lines of it that begin between two bytes (end -1: to its end)."""

    path: Path
    start: int = 0
    end: int = -1


def format_of(path: Path) -> str | None:
    """The format that a file's name stands for, its compression aside; None for an unknown one."""
    suffixes = [s.lower() for s in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """Every file that the inputs (files, folders, globs) name, sorted, once each.

    In a folder and those that it links to, files of unknown kinds and hidden ones are left alone, and of an output of
    ours all but a corpus's documents: its card and report are no text. A file named by itself is always read. Raises
    InputError for an input that names none.
    """
    found: list[Path] = []
    for item in inputs:
        path = Path(item).expanduser()
        if path.is_dir():
            files = list(_within(path))
        elif path.is_file():
            files = [path]
        else:
            try:
                files = [p for p in Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))) if p.is_file()]
            except ValueError as error:
                raise InputError(f"{item} is no pattern of files: {error}") from None
        if not files:
            kinds = ", ".join(sorted(FORMATS))
            raise InputError(f"no readable file at {item} (kinds read, plain or .gz .bz2 .xz .zst: {kinds})")
        found += sorted(files)
    once: dict[Path, Path] = {}
    for path in found:
        once.setdefault(path.resolve(), path)
    return list(once.values())


def _within(root: Path) -> Iterator[Path]:
    """The files of known kinds in a folder and in those that it links to, none of them twice; hidden ones are left."""
    entered: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(root, followlinks=True):
        state = Path(place).stat()
        if (state.st_dev, state.st_ino) in entered:
            folders.clear()
            continue
        entered.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        ours = _ours(Path(place)) if MANIFEST in names else set()
        found = (Path(place) / name for name in names if not name.startswith(".") and name not in ours)
        yield from (path for path in found if path.is_file() and format_of(path))


def _ours(folder: Path) -> set[str]:
    """What a finished folder of ours holds beside a corpus's documents."""
    try:
        manifest = read_manifest(folder)
    except InputError:
        return {MANIFEST}
    is_corpus = manifest["kind"] == "corpus"
    return {MANIFEST, *(name for name in manifest["files"] if not (is_corpus and name.startswith("documents-")))}


def read(path: Path, text_field: str = "auto", start: int = 0, end: int = -1) -> Iterator[Document]:
    """The documents of a file, or of the lines that begin in [start, end).

    Sizes add up to the decompressed bytes (for UTF-16 and UTF-32 to those of its UTF-8 form, for parquet to those of
    the text column). What cannot be read comes back with its `fault`, never silently lost.
    """
    form = format_of(path)
    if form == "parquet":
        yield from read_parquet(path, text_field)
        return
    source_name = str(path).encode("utf-8", "backslashreplace").decode()  # a name may be of any bytes
    if start:
        source_name += f"@{start}"  # what is counted in the name is counted from this byte on
    source = _utf8(pieces(path, *_line_bounds(path, start, end)))
    for part, stream in enumerate(streams(source)):
        if part == 0 and form in (None, "text", "wiki"):
            form = _sniffed(stream.peek(1024), form)
        whose = f"{source_name} (part {part + 1})" if part else source_name  # behind a damaged stretch
        yield from _documents(stream, whose, form or "text", path.suffix.lower(), text_field)
        if stream.fault:
            yield Document(f"{source_name} (damaged part {part + 1})", stream.fault.size, fault=stream.fault.reason)


def _documents(stream: Stream, source: str, form: str, suffix: str, field: str) -> Iterator[Document]:
    readers: dict[str, Callable[[], Iterator[Document]]] = {
        "text": lambda: read_text(stream, source, "text", None),
        "code": lambda: read_text(stream, source, "code", None),
        "html": lambda: read_page(stream, source, "html", None),
        "json": lambda: read_json(stream, source, field),
        "jsonl": lambda: read_json_lines(stream, source, field),
        "csv": lambda: read_csv(stream, source, field, ","),
        "tsv": lambda: read_csv(stream, source, field, "\t"),
        "warc": lambda: read_warc(stream, source),
        "wiki": lambda: read_wiki(stream, source),
    }
    return readers[form]()


def _sniffed(head: bytes, form: str | None) -> str | None:
    """The format by its content, where it shows; else what the name said."""
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"WARC/") or start.startswith(b"filedesc:"):
        return "warc"
    if start.startswith(b"<mediawiki"):
        return "wiki"
    if form is None and re.match(rb"\{\s*\n|\[\s*\{", start):  # an object over several lines, an array of records
        return "json"
    if form is None and start[:1] == b"{":
        return "jsonl"
    if form is None and start[:1] == b"<":
        return "html"
    return "html" if form == "wiki" else form  # another XML: take its visible text


def _utf8(source: Pieces) -> Pieces:
    """UTF-16 or UTF-32 with a byte order mark becomes UTF-8, so that every reader can look for newline bytes."""
    first = next(source, b"")
    mark = next((m for m in WIDE if first.startswith(m)), None) if isinstance(first, bytes) else None
    if isinstance(first, Break) or mark is None:
        yield first
        yield from source
        return
    decoder = codecs.getincrementaldecoder(WIDE[mark])("replace")
    yield decoder.decode(first).encode("utf-8", "replace")
    for piece in source:
        yield piece if isinstance(piece, Break) else decoder.decode(piece).encode("utf-8", "replace")
    yield decoder.decode(b"", True).encode("utf-8", "replace")


def spans(path: Path, size: int) -> list[Span]:
    """A large plain file of lines cut into spans of about `size` bytes; any other file in one."""
    total = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1024)
    form = format_of(path)
    lines = form in CUTTABLE and _sniffed(head, form) in CUTTABLE and not head.startswith((*WIDE,))
    if total <= 2 * size or not lines or compression(path):
        return [Span(path)]
    cuts = [*range(0, total - size // 2, size), total]
    return [Span(path, a, b) for a, b in itertools.pairwise(cuts)]


def _line_bounds(path: Path, start: int, end: int) -> tuple[int, int | None]:
    """Move both cuts to the next beginning of a line, so that neighbouring spans share out every line."""
    if end < 0 and not start:
        return 0, None
    with path.open("rb") as file:
        bounds = []
        for cut in (start, end):
            if cut > 0:
                file.seek(cut - 1)
                while (chunk := file.readline(1 << 20)) and not chunk.endswith(b"\n"):
                    pass
                cut = file.tell()
            bounds.append(cut)
    return bounds[0], bounds[1] if end >= 0 else None
