"""How every side of the generation race is timed, whatever runs: a function `generate(prompts, new)` that completes all
prompts (token ids) together by `new` tokens each, greedily, never stopping early.

  prefill 512   512 tokens read and one written
  decode        64 tokens after 512, one text; "decode after N" where BENCH_CONTEXT names another length, as of prefill
  batch 8, 32   32 tokens each after 64, so many texts together

A time to read alone is taken off where tokens written are counted. Prompts are random ids and never the same twice, so
that nobody is helped by what it remembers. Of one text, each figure is the median of three; batches are timed once.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from statistics import median

from process import peak_bytes

REPEATS = 3
USUAL = 512  # tokens of the longest prompt
Generate = Callable[[list[list[int]], int], None]


def race(generate: Generate, vocab_size: int, version: str, load_seconds: float, **more: float) -> None:
    """Time everything and print one JSON line, with `more` in it."""
    rng = random.Random(0)

    def seconds(rows: int, length: int, new: int) -> float:
        prompts = [[rng.randrange(3, vocab_size) for _ in range(length)] for _ in range(rows)]
        started = time.perf_counter()
        generate(prompts, new)
        return time.perf_counter() - started

    length = prompt_length()
    first = seconds(1, length, 1)
    read = median(seconds(1, length, 1) for _ in range(REPEATS))
    cells = {f"prefill {length}": length / read}
    decode = "decode" if length == USUAL else f"decode after {length}"
    cells[decode] = 64 / (median(seconds(1, length, 65) for _ in range(REPEATS)) - read)
    peak = peak_bytes()
    for rows in (8, 32):
        seconds(rows, 64, 2)
        cells[f"batch {rows}"] = 32 * rows / (-seconds(rows, 64, 1) + seconds(rows, 64, 33))
    print(json.dumps({"cells": cells, "unit": "tokens/s", "version": version, "load_seconds": load_seconds,
                      "first_token_seconds": first, "peak_bytes": peak} | more))  # fmt: skip


def prompt_length() -> int:
    """Tokens of the one text that is read and gone on with."""
    return int(os.environ.get("BENCH_CONTEXT", USUAL))


def threads() -> int:
    """What a contestant may use."""
    return int(os.environ["BENCH_THREADS"])
