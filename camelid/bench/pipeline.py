"""The whole corpus pipeline on inputs of several sizes: how fast, and whether memory stays flat.

The input is made from given documents: each new one draws twenty sentences of theirs at random (seed 0), so that any
size can be had and hardly any two are near-duplicates.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from camelid import __version__
from camelid.errors import CamelidError
from camelid.report.progress import progress

SENTENCES = 20


def run(texts: Sequence[str], megabytes: Sequence[float], workers: int, quiet: bool = False) -> list[dict[str, Any]]:
    """Rows {implementation, version, task, threads, value in MB/s, unit, input_bytes, peak_bytes}, one a size.

    `peak_bytes` is the largest sum of the memory of all processes of the build (proportional set size, looked at five
    times a second); None where the system does not tell it.
    """
    pool = [s for text in texts for s in text.replace("\n", " ").split(". ") if s]
    rows = []
    with progress("pipeline", len(megabytes), quiet) as advance, TemporaryDirectory() as scratch:
        for number, size in enumerate(megabytes):
            source, out = Path(scratch) / "input.jsonl", Path(scratch) / f"corpus-{number}"
            written = _make(pool, int(size * 1e6), source)
            seconds, peak = _watch(
                [sys.executable, "-m", "camelid", "corpus", "build", str(source), "--out", str(out), "--json",
                 f"workers={workers}"]
            )  # fmt: skip
            rows.append(
                {"implementation": "camelid", "version": __version__, "task": f"pipeline {size:g} MB",
                 "threads": workers, "value": written / seconds / 1e6, "unit": "MB/s", "input_bytes": written,
                 "peak_bytes": peak}
            )  # fmt: skip
            advance(number + 1)
    return rows


def _make(pool: Sequence[str], size: int, path: Path) -> int:
    """Write about `size` bytes of documents; returns how many bytes."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            for _ in range(1000):
                print(json.dumps({"text": ". ".join(draw.choices(pool, k=SENTENCES)) + "."}), file=file)
    return path.stat().st_size


def _watch(command: Sequence[str]) -> tuple[float, int | None]:
    """Seconds and peak memory of a command with its children. Raises CamelidError when it fails."""
    started, peak = time.perf_counter(), 0
    with TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(0.2)
        said.seek(0)
        last = (said.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    if process.returncode:
        raise CamelidError(f"{' '.join(command)} ended with {process.returncode}: {last}")
    return time.perf_counter() - started, peak or None


def _memory(pid: int) -> int:
    """Proportional set size in bytes of a process and its descendants, 0 where /proc does not tell."""
    try:
        figures = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except OSError:
        return 0
    own = next((int(line.split()[1]) for line in figures if line.startswith("Pss:")), 0)
    return own * 1024 + sum(_memory(int(child)) for child in children)
