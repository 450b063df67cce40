"""What happens to text before training, beside the tools that people use for it: quality filters (datatrove), MinHash
(daft), tokenizers (bench/tokens.py), the same documents for all; and the whole corpus pipeline alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from camelid.bench import pipeline, tokens
from camelid.bench.race import Contestant, race, ratios
from camelid.corpus.clean import texts_of
from camelid.errors import InputError

Only = Literal["corpus", "tokens"]
DATATROVE = ("datatrove==0.10.1", "spacy", "orjson", "nltk")
CONTESTANTS = [
    Contestant("camelid", "own_corpus.py", "filters"),
    Contestant("datatrove", "datatrove_filters.py", "filters", DATATROVE),
    Contestant("camelid", "own_corpus.py", "minhash"),
    Contestant("daft", "daft_minhash.py", "minhash", ("daft==0.7.26",)),
]


def run(
    data: str,
    rounds: int = 3,
    limit_bytes: int = 20_000_000,
    pipeline_megabytes: Sequence[float] = (),
    workers: int = 1,
    quiet: bool = False,
    only: Only | None = None,
) -> dict[str, Any]:
    """Race on the documents of a file or folder (at most `limit_bytes` of text), then build corpora of the sizes in
    `pipeline_megabytes` from them. Returns rows, limits and ratios. Raises InputError when there is no text."""
    texts = _texts(data, limit_bytes)
    limits = {"text_bytes": sum(len(text.encode()) for text in texts)}
    found: dict[str, Any] = {"rows": [], "limits": limits, "ratios": {}, "differences": {}}
    if only != "tokens":
        _corpus(found, texts, rounds, quiet)
    if only != "corpus":
        raced = tokens.run(texts, rounds, quiet=quiet)
        found["rows"] += raced["rows"]
        found["ratios"] |= raced["ratios"]
        found["same_ids"] = raced["same_ids"]
    if pipeline_megabytes:
        found["rows"] += pipeline.run(texts, pipeline_megabytes, workers, quiet)
    return found


def _corpus(found: dict[str, Any], texts: Sequence[str], rounds: int, quiet: bool) -> None:
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "documents.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        rows = race(CONTESTANTS, path, rounds, quiet)
    found["differences"] = _differences(rows)
    found["rows"] += rows
    found["ratios"] |= ratios(rows)


def _texts(data: str, limit_bytes: int) -> list[str]:
    texts, size = [], 0
    for text in texts_of([data]):
        texts.append(text)
        size += len(text.encode())
        if size >= limit_bytes:
            break
    if not texts:
        raise InputError(f"{data} holds no text to race on")
    return texts


def _differences(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Where our filters and datatrove's decide differently, document by document."""
    decisions = [r.pop("decisions") for r in rows if "decisions" in r]
    if len(decisions) != 2:
        return {}
    ours, theirs = decisions
    unlike = [(n, a, b) for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if bool(a) != bool(b)]
    return {"documents": len(ours), "dropped": [sum(map(bool, ours)), sum(map(bool, theirs))], "unlike": unlike}
