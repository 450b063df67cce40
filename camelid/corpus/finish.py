"""The last pass over a unit: leave out what deduplication found, and close the unit's account."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camelid.corpus.account import Account
from camelid.corpus.unit import DONE, line_hashes, writer
from camelid.disk import write_atomic

SHARDS = "documents-{:05}.parquet"
COLUMNS = ("text", "source", "origin", "language")


@dataclass(frozen=True)
class _RepeatedLines:
    hashes: NDArray[np.uint64]
    first: NDArray[np.int64]

    def without(self, text: str, document: int) -> str:
        """The text without lines that an earlier document has."""
        lines = line_hashes(text)
        if not len(self.hashes) or not len(lines):
            return text
        at = np.minimum(np.searchsorted(self.hashes, lines), len(self.hashes) - 1)
        gone = (self.hashes[at] == lines) & (self.first[at] < document)
        if not gone.any():
            return text
        return "\n".join(line for line, out in zip(text.split("\n"), gone, strict=True) if not out).strip("\n")


def finish(folder: str, first_id: int, work: Path, copies: Path, near: Path, lines: Path | None) -> None:
    """Write `final.parquet` and `finished.json` of a unit whose documents' ids begin at `first_id`."""
    unit = work / folder
    if (unit / "finished.json").exists():
        return
    done = json.loads((unit / DONE).read_text(encoding="utf-8"))
    account, rows, digest = Account.from_dict(done["account"]), 0, hashlib.sha256()
    exact, similar = (_ids(path, first_id, done["rows"]) for path in (copies, near))
    repeated = _load_lines(lines)
    with writer(unit / "final.parquet", COLUMNS) as write:
        for start, batch in _batches(unit / "documents.parquet"):
            kept = []
            for offset, row in enumerate(batch):
                identity = first_id + start + offset
                text, reason = row["text"], None
                if identity in exact:
                    reason = "duplicate"
                elif identity in similar:
                    reason = "near_duplicate"
                elif repeated:
                    text = repeated.without(text, identity)
                    reason = "repeated_lines_only" if not text.strip() else None
                if reason:
                    account.drop_kept(row["source"], row["size"], reason, row["text"])
                    continue
                account.keep(text, row["language"])
                digest.update(text.encode() + b"\0")
                kept.append({**row, "text": text})
            write([{name: row[name] for name in COLUMNS} for row in kept])
            rows += len(kept)
    account.check()
    finished = {"rows": rows, "digest": digest.hexdigest(), "account": account.to_dict()}
    write_atomic(unit / "finished.json", json.dumps(finished, ensure_ascii=False))


def _ids(path: Path, first: int, count: int) -> set[int]:
    """Which of this unit's documents stand in the first column of a file of pairs."""
    dropped = np.load(path, mmap_mode="r")[:, 0]
    low, high = np.searchsorted(dropped, (first, first + count))
    return set(dropped[low:high].tolist())


def _load_lines(path: Path | None) -> _RepeatedLines | None:
    if path is None:
        return None
    hashes, first = np.load(path, mmap_mode="r")
    return _RepeatedLines(hashes.view(np.uint64), first)


def _batches(path: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    import pyarrow.parquet as pq

    start = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            yield start, batch.to_pylist()
            start += batch.num_rows
