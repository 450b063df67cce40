"""camelid's side of the data race: own_corpus.py {filters,minhash} DOCUMENTS.jsonl."""

from __future__ import annotations

import json
import sys
import time

from camelid import __version__
from camelid.corpus import c4, filters, shingles, statistics
from camelid.kernels import text as native

GROUPS = ("gopher_quality", "gopher_repetition")


def filtered(texts: list[str]) -> list[str]:
    """Gopher quality, Gopher repetition, then C4, as datatrove runs them; why each text goes, or ""."""
    figures = statistics.measure(texts)
    reasons = [filters.reason_to_drop(s, "en", GROUPS) or "" for s in figures]
    left = [i for i, reason in enumerate(reasons) if not reason]
    for i, (_, reason) in zip(left, c4.clean([texts[i] for i in left]), strict=True):
        reasons[i] = reason
    return reasons


def main() -> None:
    task, path = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    size = sum(len(text.encode()) for text in texts)
    filtered(texts[:1])  # loads the library
    started = time.perf_counter()
    decisions = filtered(texts) if task == "filters" else shingles.signatures(*shingles.shingles(texts))
    seconds = time.perf_counter() - started
    path_taken = "native" if native.ready(statistics.tables) else "python"
    result = {"value": size / seconds / 1e6, "unit": "MB/s", "version": f"{__version__} ({path_taken})"}
    print(json.dumps(result | ({"decisions": decisions} if task == "filters" else {})))


main()
