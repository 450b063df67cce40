"""Files of training material -> records: JSON lines, JSON, parquet; what was found is said, what is bad is counted."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from camelid.errors import InputError, MissingExtra
from camelid.finetune.records import BadRow, Record, record
from camelid.report.progress import progress

Used = TypeVar("Used")
SHOWN = 3  # bad rows that are told in words
KINDS = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".txt")


@dataclass
class Found:
    """What a file holds: good rows by format, and why the bad ones are bad, with their numbers."""

    path: Path
    formats: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[int, str]] = field(default_factory=list)

    def said(self) -> str:
        """In words, with the first bad rows."""
        kinds = ", ".join(f"{count:,} {name}" for name, count in self.formats.most_common()) or "no good rows"
        told = [f"{self.path.name}: {kinds}" + (f", {len(self.bad):,} bad:" if self.bad else "")]
        told += [f"  record {number} {why}" for number, why in self.bad[:SHOWN]]
        if len(self.bad) > SHOWN:
            told.append(f"  … and {len(self.bad) - SHOWN:,} more")
        return "\n".join(told)


def read_file(path: Path, use: Callable[[Record], Used], quiet: bool = True) -> tuple[list[Used], Found]:
    """What `use` makes of each good row of a file, and what was found; `use` may raise BadRow as well.

    Raises InputError when the file cannot be read.
    """
    found, used, all_rows = Found(path), [], list(rows(path))
    with progress(path.name, len(all_rows), quiet) as advance:
        for done, (number, row) in enumerate(all_rows, 1):
            try:
                if isinstance(row, BadRow):
                    raise row
                read = record(row)
                used.append(use(read))
                found.formats[read.format] += 1
            except BadRow as error:
                found.bad.append((number, str(error)))
            except InputError as error:  # of the tokenizer or its template, which this row is the first to show
                raise InputError(f"{path.name}, record {number}: {error}") from None
            if not done % 64:
                advance(done)
    return used, found


def rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, row); a BadRow in place of one that is no JSON. Raises InputError for the file as a whole."""
    name = path.name
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    if name.endswith(".parquet"):
        yield from _parquet(path)
        return
    try:
        raw = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from None
    if name.endswith(".txt"):
        yield 1, {"text": text}
    elif name.endswith(".json"):
        yield from _json(path, text)
    elif name.endswith((".jsonl", ".jsonl.gz")):
        yield from _lines(text)
    else:
        raise InputError(f"{path} is none of {', '.join(KINDS)}: rename it, or write it as JSON lines")


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, BadRow(f"is not JSON: {error}")


def _json(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":  # lines under the other name
            yield from _lines(text)
            return
        raise InputError(f"{path} is not JSON: {error}") from None
    if isinstance(whole, dict):
        whole = [whole]
    if not isinstance(whole, list):
        raise InputError(f"{path} holds a {type(whole).__name__}, not a list of rows")
    yield from enumerate(whole, 1)


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtra("pyarrow", "data", "parquet files") from None
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _real(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is no readable parquet file: {error}") from None


def _real(value: Any) -> Any:
    """Without the fields that a table had to fill with nulls, because another row's object has them."""
    if isinstance(value, dict):
        return {key: _real(one) for key, one in value.items() if one is not None}
    return [_real(one) for one in value] if isinstance(value, list) else value


def read_files(
    key: str, paths: Sequence[Path], use: Callable[[Record], Used], max_bad_share: float, quiet: bool = True
) -> tuple[list[Used], list[Found]]:
    """`read_file` over all files in order. Raises InputError, with the recipe's key in front, when no row of one is
    good, or too many are bad."""
    used: list[Used] = []
    founds: list[Found] = []
    for path in paths:
        try:
            good, found = read_file(path, use, quiet)
        except MissingExtra:
            raise
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
        if not good and not found.bad:
            raise InputError(f"{key}: {path} holds no row")
        share = len(found.bad) / (len(found.bad) + len(good))
        if not good or share > max_bad_share:
            cure = "mend them" if not good else f"more than {max_bad_share:.0%}: mend them, or raise data.max_bad_share"
            raise InputError(f"{key}: {found.said()}; {cure}")
        used += good
        founds.append(found)
    return used, founds
