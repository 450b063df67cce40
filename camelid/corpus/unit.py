"""The unit of work: some files, or a stretch of one. Units depend on the inputs alone, never on how many workers
there are, and each leaves a folder that is complete when its `done.json` is there.

A unit's folder holds `documents.parquet` (the clean documents with their record's size), `exact.npy` (a 128-bit
digest of each), `bands.npy` (LSH keys [bands, documents]), `shingles.npy` with `shingle_offsets.npy`, and, when asked
for, `lines.npy` with `line_offsets.npy`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camelid.corpus import decontaminate
from camelid.corpus.account import Account
from camelid.corpus.clean import Clean, Cleaner
from camelid.corpus.document import Document
from camelid.corpus.minhash import band_keys
from camelid.corpus.read import Span, find_files, read, spans
from camelid.corpus.shingles import shingles, signatures
from camelid.disk import settle, write_array, write_atomic
from camelid.errors import MissingExtra
from camelid.recipe import CorpusSection

SPAN_BYTES = 32 * 2**20  # a large plain file is cut into stretches of this size
UNIT_BYTES, UNIT_FILES = 16 * 2**20, 2000  # small files are grouped up to either
DONE = "done.json"
ROWS_PER_GROUP = 1000


@dataclass(frozen=True)
class Unit:
    """What one task reads. `source` is the name of the mixture's source."""

    number: int
    source: str
    spans: tuple[Span, ...]

    @property
    def folder(self) -> str:
        return f"{self.number:06}"


def plan(sources: Sequence[tuple[str, Sequence[str | Path]]]) -> list[Unit]:
    """The units of named inputs, in order. Raises InputError for an input that names no file."""
    units: list[Unit] = []
    for name, inputs in sources:
        group: list[Span] = []
        size = 0
        for path in find_files(inputs):
            for span in spans(path, SPAN_BYTES):
                length = path.stat().st_size if span.end < 0 else span.end - span.start
                if group and (size + length > UNIT_BYTES or len(group) >= UNIT_FILES):
                    units.append(Unit(len(units), name, tuple(group)))
                    group, size = [], 0
                group.append(span)
                size += length
        units.append(Unit(len(units), name, tuple(group)))
    return units


@cache
def _cleaner(settings: str, perplexity_model: str | None, states: tuple[tuple[int, ...], ...]) -> Cleaner:
    """One per worker process: loading the evaluation sets takes a while. `states`: the files' sizes and times."""
    section = CorpusSection.model_validate_json(settings)
    evaluated = decontaminate.load(section.decontaminate)
    if perplexity_model is None:
        return Cleaner(section, evaluated)
    from camelid.corpus.ngram import NgramModel

    model = NgramModel.load(Path(perplexity_model))
    return Cleaner(section, evaluated, model.perplexities, model.limit)


def process(unit: Unit, work: Path, settings: CorpusSection, perplexity_model: Path | None = None) -> None:
    """Clean a unit's documents into its folder under `work`; nothing to do when it is complete."""
    folder = work / unit.folder
    if (folder / DONE).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    files = [Path(file).expanduser() for file in settings.decontaminate]
    found = [path.stat() for path in (*files, *((perplexity_model,) if perplexity_model else ()))]
    states = tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in found)
    cleaner = _cleaner(settings.model_dump_json(), str(perplexity_model) if perplexity_model else None, states)
    account, keys = Account(), Keys(settings)
    with writer(folder / "documents.parquet") as write:
        for batch in cleaner.run(_records(unit, settings.text_field), account):
            keys.add([item.text for item in batch])
            write([row(item, unit.source) for item in batch])
    keys.save(folder)
    account.check()
    write_atomic(folder / DONE, json.dumps({"rows": keys.count, "account": account.to_dict()}, ensure_ascii=False))


def _records(unit: Unit, text_field: str) -> Iterator[Document]:
    for span in unit.spans:
        yield from read(span.path, text_field, span.start, span.end)


def row(item: Clean, source: str) -> dict[str, Any]:
    """A row of documents.parquet."""
    return {
        "text": item.text,
        "source": item.record.source,
        "origin": source,
        "language": item.language,
        "size": item.record.size,
    }


class writer:
    """Appends rows to a parquet file in groups of bounded size: `with writer(path) as write: write(rows)`."""

    def __init__(self, path: Path, columns: Sequence[str] = ("text", "source", "origin", "language", "size")) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise MissingExtra("pyarrow", "data", "writing a corpus") from None
        kinds = {"size": pa.int64(), "text": pa.large_string()}
        self._schema = pa.schema([(name, kinds.get(name, pa.string())) for name in columns])
        self._table = pa.Table.from_pylist
        self._path = path
        self._file = pq.ParquetWriter(path, self._schema, compression="zstd")

    def __enter__(self) -> Any:
        return self._write

    def _write(self, rows: list[dict[str, Any]]) -> None:
        for start in range(0, len(rows), ROWS_PER_GROUP):
            part = rows[start : start + ROWS_PER_GROUP]
            self._file.write_table(self._table(part, schema=self._schema))

    def __exit__(self, *error: object) -> None:
        self._file.close()
        settle(self._path)


class Keys:
    """What deduplication needs to know of a unit's documents, collected a batch at a time."""

    def __init__(self, settings: CorpusSection) -> None:
        self._settings = settings
        self.count = 0
        self._parts: dict[str, list[NDArray[Any]]] = {}

    def add(self, texts: Sequence[str]) -> None:
        self.count += len(texts)
        if self._settings.deduplicate != "none":
            digests = b"".join(hashlib.blake2b(t.encode(), digest_size=16).digest() for t in texts)
            self._append("exact", np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2))
        if self._settings.deduplicate == "near":
            hashes, offsets = shingles(texts)
            self._append("shingles", hashes)
            self._append("shingle_sizes", np.diff(offsets))
            self._append("bands", band_keys(signatures(hashes, offsets), np.diff(offsets)))
        if self._settings.deduplicate_lines:
            lines = [line_hashes(t) for t in texts]
            self._append("lines", np.concatenate(lines) if lines else np.empty(0, np.uint64))
            self._append("line_sizes", np.array([len(x) for x in lines], dtype=np.int64))

    def _append(self, name: str, array: NDArray[Any]) -> None:
        self._parts.setdefault(name, []).append(array)

    def save(self, folder: Path) -> None:
        for name, parts in self._parts.items():
            array = np.concatenate(parts)
            if name == "bands":
                array = np.ascontiguousarray(array.T)  # one band's keys lie together
            elif name.endswith("_sizes"):
                name, array = name.replace("sizes", "offsets"), np.concatenate(([0], np.cumsum(array)))
            write_array(folder / f"{name}.npy", array)


_NOT_WORD = re.compile(r"[\W\d_]+")
MIN_LINE = 12  # shorter lines ("Yes.", "}") repeat without being copies


def line_hashes(text: str) -> NDArray[np.uint64]:
    """A hash of every line that is long enough to be a copy, else 0; without case, digits and punctuation (CCNet)."""
    bare = [_NOT_WORD.sub("", line).lower() for line in text.split("\n")]
    digests = [hashlib.blake2b(b.encode(), digest_size=8).digest() if len(b) >= MIN_LINE else bytes(8) for b in bare]
    return np.frombuffer(b"".join(digests), dtype=np.uint64)
