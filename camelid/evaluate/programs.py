"""Programs that a model wrote, run against their tests, and pass@k (arXiv:2107.03374, section 2.1).

A program runs as a process of this user, in an empty folder that is removed, without this process's environment, with
limits on its time, memory, processes and the size of what it writes, and without a network where the kernel lets an
ordinary user leave it. That stops accidents, not an adversary.
"""

from __future__ import annotations

import math
import resource
import shutil
import subprocess
import sys
from functools import cache
from tempfile import TemporaryDirectory

SECONDS = 10
MEMORY = 1 << 30
WRITES = 1 << 20


def passes(program: str, tests: str) -> bool:
    """Whether a Python program, with its tests after it, ends well."""
    with TemporaryDirectory() as folder:
        command = [*_apart(), sys.executable, "-I", "-S", "-c", f"{program}\n\n{tests}\n"]
        try:
            done = subprocess.run(
                command, cwd=folder, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, timeout=SECONDS, check=False, start_new_session=True, preexec_fn=_limit,
            )  # fmt: skip
        except (subprocess.TimeoutExpired, ValueError, OSError):  # a NUL in the text, or a text too long for a command
            return False
        return done.returncode == 0


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of `k` programs passes, estimated from `n` of which `c` did: 1 - C(n-c, k) / C(n, k)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _limit() -> None:
    for kind, most in (
        (resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, WRITES),
        (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(kind, (most, most))


@cache
def _apart() -> tuple[str, ...]:
    """What a command begins with to run without a network."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, "--map-root-user", "--net")
    done = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if done.returncode == 0 else ()
