"""How many threads there are for a program, and how they wait.

How long a thread of torch's OpenMP waits at hand for its next loop. By GNU's default it spins for milliseconds, all
of its share of a core: of two programs on the same cores each then waits for the other's waiting, and both become ten
times slower. After tens of microseconds it sleeps here, which costs a step that is alone one or two parts in a hundred
(docs/decisions.md has the figures)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

SPINS, POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"  # GNU's OpenMP reads them when it is loaded
FEW = "3000"
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def processors() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(path: Path = QUOTA) -> float | None:
    """Processors' worth of time that a container may use; None without a limit."""
    try:
        most, period = path.read_text(encoding="utf-8").split()
        return None if most == "max" else int(most) / int(period)
    except (OSError, ValueError):
        return None


def cores() -> int:
    """As many threads as can compute at once: this process's processors, or what its container gives it of them."""
    limit = quota()
    return processors() if limit is None else max(1, min(processors(), math.ceil(limit)))


def share_cores(environment: MutableMapping[str, str]) -> None:
    """Let threads sleep soon, in a process that has not loaded torch or in one that is started, unless it is told how
    they wait."""
    if POLICY not in environment:
        environment.setdefault(SPINS, FEW)


def by_default(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what `share_cores` set."""
    return {name: value for name, value in environment.items() if (name, value) != (SPINS, FEW)}
