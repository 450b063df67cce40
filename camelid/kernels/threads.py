"""How long a thread of torch's OpenMP waits at hand for its next loop. By GNU's default it spins for milliseconds, all
of its share of a core: of two programs on the same cores each then waits for the other's waiting, and both become ten
times slower. After tens of microseconds it sleeps here, which costs a step that is alone one or two parts in a hundred
(docs/decisions.md has the figures)."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

SPINS, POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"  # GNU's OpenMP reads them when it is loaded
FEW = "3000"


def share_cores(environment: MutableMapping[str, str]) -> None:
    """Let threads sleep soon, in a process that has not loaded torch or in one that is started, unless it is told how
    they wait."""
    if POLICY not in environment:
        environment.setdefault(SPINS, FEW)


def by_default(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what `share_cores` set."""
    return {name: value for name, value in environment.items() if (name, value) != (SPINS, FEW)}
