"""Run contestants in turns and compare them. A contestant is a script that does one task on a file and prints one JSON
object with `value`, `unit` and `version`; peers run in environments of their own, made when first needed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from camelid.errors import CamelidError
from camelid.kernels.threads import by_default, share_cores
from camelid.report.progress import progress

TRANSFORMERS = ("transformers==5.23.0", "torch==2.13.0", "numpy")
SCRIPTS = Path(__file__).parent / "contestants"


@dataclass(frozen=True)
class Contestant:
    """`script` in contestants/, the task it is given, what pip installs for it (nothing: this environment), how many
    threads it may use, and what else it finds in its environment as BENCH_…."""

    name: str
    script: str
    task: str
    packages: tuple[str, ...] = ()
    threads: int = 1
    settings: tuple[tuple[str, str], ...] = ()


def cache_folder() -> Path:
    """Where peers' environments are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "camelid" / "bench"


def interpreter(contestant: Contestant) -> Path | None:
    """The Python that runs a contestant; None when its packages cannot be installed."""
    if not contestant.packages:
        return Path(sys.executable)
    folder = cache_folder() / contestant.packages[0].partition("==")[0]
    python, ready = folder / "bin" / "python", folder / "ready"
    wanted = "\n".join((f"python=={sys.version_info.major}.{sys.version_info.minor}", *contestant.packages))
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return python
    ready.unlink(missing_ok=True)
    print(f"installing {', '.join(contestant.packages)} into {folder} (once)", file=sys.stderr)
    for command in (
        [sys.executable, "-m", "venv", folder],
        [python, "-m", "pip", "install", "-q", *contestant.packages],
    ):
        if subprocess.run(list(map(str, command)), capture_output=True, check=False).returncode:
            return None
    ready.write_text(wanted, encoding="utf-8")
    return python


def once(contestant: Contestant, python: Path, data: Path) -> dict[str, Any]:
    """One run. Returns what the script printed, or {"error": …}."""
    names = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "POLARS_MAX_THREADS", "MKL_NUM_THREADS", "BENCH_THREADS")
    threads = dict.fromkeys(names, str(contestant.threads)) | {"BENCH_NAME": contestant.name}
    quiet = {"DO_NOT_TRACK": "true", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [str(python), str(SCRIPTS / contestant.script), contestant.task, str(data)]
    environment = by_default(os.environ) | threads | quiet | {f"BENCH_{k}": v for k, v in contestant.settings}
    if not contestant.packages:
        share_cores(environment)  # as the command line has it
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return found


def race(contestants: list[Contestant], data: Path, rounds: int, quiet: bool = False) -> list[dict[str, Any]]:
    """All contestants in turns, `rounds` times. Rows {implementation, version, task, threads, value (the median), unit,
    rounds}; one that is missing or fails has `error` instead of figures."""
    pythons = {c: interpreter(c) for c in contestants}
    results: dict[Contestant, list[dict[str, Any]]] = {c: [] for c in contestants}
    with progress("bench", rounds * len(contestants), quiet) as advance:
        for number in range(rounds):
            for place, contestant in enumerate(contestants):
                python = pythons[contestant]
                missing = {"error": f"pip could not install {' '.join(contestant.packages)}"}
                results[contestant].append(once(contestant, python, data) if python else missing)
                advance(number * len(contestants) + place + 1, contestant.name)
    return [_row(contestant, found) for contestant, found in results.items()]


def _row(contestant: Contestant, found: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"implementation": contestant.name, "task": contestant.task, "threads": contestant.threads}
    good = [f for f in found if "error" not in f]
    if not good:
        return row | {"error": found[0]["error"]}
    extra = {k: v for k, v in good[-1].items() if k not in ("value", "unit", "version", "cells")}
    if "cells" in good[-1]:  # several figures of one process
        cells = {name: [f["cells"][name] for f in good] for name in good[-1]["cells"]}
        return row | {"version": good[-1]["version"], "unit": good[-1]["unit"], "cells": cells} | extra
    values = [f["value"] for f in good]
    return (
        row
        | {"version": good[-1]["version"], "value": median(values), "unit": good[-1]["unit"], "rounds": values}
        | extra
    )


def ratios(rows: list[dict[str, Any]], ours: str = "camelid", key: str = "value") -> dict[str, float]:
    """Ours over each peer at the same task: of speeds, above 1 we are faster."""
    own = {(r["task"], r["threads"]): r[key] for r in rows if r["implementation"] == ours and key in r}
    found = {}
    for r in rows:
        place = r["task"], r["threads"]
        if r["implementation"] != ours and key in r and place in own:
            threads = f", {r['threads']} threads" if r["threads"] > 1 else ""
            found[f"{r['task']}{threads}: {ours} / {r['implementation']}"] = round(own[place] / r[key], 3)
    return found


def agree(rows: list[dict[str, Any]], figure: Callable[[dict[str, Any]], float], bound: float, what: str) -> None:
    """Raises CamelidError when a figure that should be all contestants' differs by more than `bound`, or is no number:
    then one of them computes something else. Rows without figures are left out."""
    found = {f"{r['implementation']}, {r['threads']} threads": figure(r) for r in rows if "value" in r}
    finite = all(math.isfinite(x) for x in found.values())
    if found and not (finite and max(found.values()) - min(found.values()) <= bound):
        raise CamelidError(f"{what} differ, so no speed is given: {found}")
