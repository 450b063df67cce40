"""Build a corpus folder: read, repair, filter, deduplicate exactly, write parquet; every document is accounted for."""

from __future__ import annotations

import hashlib
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from camelid.artifact import new_folder, read_manifest, write_manifest
from camelid.corpus.filters import Limits, reason_to_drop
from camelid.corpus.read import Document, find_files, read
from camelid.errors import InputError, MissingExtra
from camelid.report.progress import progress

DOCUMENTS = "documents.parquet"
ROWS_PER_GROUP = 1000
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def repair(text: str) -> str:
    """Undo mis-decoding (ftfy), normalise to NFC and to \\n, drop control characters and trailing blanks."""
    try:
        import ftfy
    except ImportError:
        raise MissingExtra("ftfy", "data", "repairing text") from None
    # Quotes and ligatures are the author's; only damage is undone.
    text = ftfy.fix_encoding(text)
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    return "\n".join(line.rstrip() for line in _CONTROL.sub("", text).split("\n")).strip("\n")


class Tally:
    """Documents and source bytes: read = kept + dropped + quarantined, always."""

    def __init__(self) -> None:
        self.read = self.kept = 0
        self.dropped: Counter[str] = Counter()
        self.quarantined: Counter[str] = Counter()

    def summary(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "quarantined": dict(self.quarantined),
        }


class _Account:
    def __init__(self) -> None:
        self.documents, self.bytes = Tally(), Tally()

    def add(self, document: Document, where: str, reason: str = "") -> None:
        for tally, amount in ((self.documents, 1), (self.bytes, document.size)):
            tally.read += amount
            if where == "kept":
                tally.kept += amount
            else:
                getattr(tally, where)[reason] += amount


def build(
    inputs: Sequence[str | Path], out: str | Path, limits: Limits | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Make the corpus folder `out`. Returns the counts, the digest of the kept texts in order, and `out`."""
    limits = limits or Limits()
    files = find_files(inputs)
    account, digest, seen = _Account(), hashlib.sha256(), set[bytes]()
    started = time.monotonic()
    with new_folder(Path(out)) as folder, progress("corpus", len(files), quiet) as advance:
        rows = _kept(files, limits, account, seen, advance)
        written = _write(folder / DOCUMENTS, rows, digest)
        result = {
            "documents": account.documents.summary(),
            "bytes": account.bytes.summary(),
            "digest": digest.hexdigest(),
        }
        if not written:
            raise InputError(f"no document of {len(files)} files was kept: {account.documents.summary()}")
        write_manifest(folder, "corpus", files, asdict(limits), **result, seconds=time.monotonic() - started)
    return {**result, "out": str(out)}


def _kept(
    files: list[Path], limits: Limits, account: _Account, seen: set[bytes], advance: Any
) -> Iterator[dict[str, str]]:
    for number, path in enumerate(files, 1):
        for document in read(path):
            if document.fault:
                account.add(document, "quarantined", document.fault)
                continue
            text = repair(document.text)
            mark = hashlib.sha256(text.encode()).digest()
            reason = "duplicate" if mark in seen else reason_to_drop(text, limits)
            if reason:
                account.add(document, "dropped", reason)
                continue
            seen.add(mark)
            account.add(document, "kept")
            yield {"text": text, "source": document.source}
        advance(number)


def _write(path: Path, rows: Iterator[dict[str, str]], digest: Any) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtra("pyarrow", "data", "writing a corpus") from None
    schema = pa.schema([("text", pa.string()), ("source", pa.string())])
    count, group = 0, list[dict[str, str]]()
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for row in rows:
            digest.update(row["text"].encode() + b"\0")
            group.append(row)
            count += 1
            if len(group) == ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
    return count


def documents(corpus: str | Path) -> Iterator[str]:
    """The texts of a corpus folder, in order. Raises InputError when it is not a finished corpus."""
    folder = Path(corpus)
    if read_manifest(folder)["kind"] != "corpus":
        raise InputError(f"{folder} is not a corpus: make one with `camelid corpus build`")
    for document in read(folder / DOCUMENTS):
        yield document.text
