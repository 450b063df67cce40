"""Threads that wait sleep soon: what torch's OpenMP was told, read from what it says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from camelid.kernels import threads
from camelid.kernels.threads import FEW, POLICY, SPINS, by_default, cores, processors, quota, share_cores


def told(**given: str) -> list[str]:
    """The lines in which OpenMP shows how it waits, in the process of a command that opens torch."""
    environment = {k: v for k, v in os.environ.items() if k not in (SPINS, POLICY)} | given
    command = [sys.executable, "-m", "camelid", "info", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment | {"OMP_DISPLAY_ENV": "verbose"}
    )
    return [line.split("=")[1].strip(" '") for line in done.stderr.splitlines() if SPINS in line]


@pytest.mark.skipif(sys.platform != "linux", reason="only the wheels for Linux bring GNU's OpenMP")
def test_the_command_line_has_torchs_threads_sleep_soon() -> None:
    assert told() == [FEW]
    assert told(**{SPINS: "77"}) == ["77"]
    assert told(**{POLICY: "active"}) != [FEW]


def test_a_containers_share_of_the_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cgroup v2's cpu.max; as many threads as that, and one at least."""
    for content, wanted in (("50000 100000", 0.5), ("250000 100000", 2.5), ("max 100000", None), ("odd", None)):
        (tmp_path / "cpu.max").write_text(f"{content}\n")
        assert quota(tmp_path / "cpu.max") == wanted
    assert quota(tmp_path / "none") is None
    monkeypatch.setattr(threads, "processors", lambda: 8)
    for limit, wanted_cores in ((None, 8), (0.5, 1), (2.5, 3), (64.0, 8)):
        monkeypatch.setattr(threads, "quota", lambda limit=limit: limit)
        assert cores() == wanted_cores
    assert processors() >= 1


def test_what_the_user_says_stays() -> None:
    assert by_default({SPINS: "77", "A": "b"}) == {SPINS: "77", "A": "b"}
    environment = {"A": "b"}
    share_cores(environment)
    assert environment == {"A": "b", SPINS: FEW}
    assert by_default(environment) == {"A": "b"}
