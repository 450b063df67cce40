"""The corpus's hot loops against datatrove's filters and daft's MinHash, one thread, the same documents."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from camelid.bench.race import Contestant, race, ratios
from camelid.corpus.clean import plain_text
from camelid.corpus.read import find_files, read
from camelid.errors import InputError

DATATROVE = ("datatrove==0.10.1", "spacy", "orjson", "nltk")
CONTESTANTS = [
    Contestant("camelid", "own_corpus.py", "filters"),
    Contestant("datatrove", "datatrove_filters.py", "filters", DATATROVE),
    Contestant("camelid", "own_corpus.py", "minhash"),
    Contestant("daft", "daft_minhash.py", "minhash", ("daft==0.7.26",)),
]


def run(data: str, rounds: int = 3, limit_bytes: int = 20_000_000, quiet: bool = False) -> dict[str, Any]:
    """Race on the documents of a file or folder (at most `limit_bytes` of text). Returns rows, limits and ratios."""
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "documents.jsonl"
        size = _write(data, path, limit_bytes)
        rows = race(CONTESTANTS, path, rounds, quiet)
    return {"rows": rows, "limits": {"text_bytes": size}, "ratios": ratios(rows), "differences": _differences(rows)}


def _write(data: str, path: Path, limit_bytes: int) -> int:
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for record in (r for found in find_files([data]) for r in read(found)):
            text = "" if record.fault or record.skip else plain_text(record)
            if text and size < limit_bytes:
                size += len(text.encode())
                print(json.dumps({"text": text}), file=file)
    if not size:
        raise InputError(f"{data} holds no text to race on")
    return size


def _differences(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Where our filters and datatrove's decide differently, document by document."""
    decisions = [r.pop("decisions") for r in rows if "decisions" in r]
    if len(decisions) != 2:
        return {}
    ours, theirs = decisions
    unlike = [(n, a, b) for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if bool(a) != bool(b)]
    return {"documents": len(ours), "dropped": [sum(map(bool, ours)), sum(map(bool, theirs))], "unlike": unlike}
