"""daft's side of the data race: its MinHash expression, 128 hashes over 5-word shingles."""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version

import daft


def main() -> None:
    with open(sys.argv[2], encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    size = sum(len(text.encode()) for text in texts)

    def signatures(some: list[str]) -> None:
        frame = daft.from_pydict({"text": some})
        frame.select(daft.col("text").minhash(num_hashes=128, ngram_size=5)).collect()

    signatures(texts[:1])
    started = time.perf_counter()
    signatures(texts)
    seconds = time.perf_counter() - started
    print(json.dumps({"value": size / seconds / 1e6, "unit": "MB/s", "version": version("daft")}))


main()
