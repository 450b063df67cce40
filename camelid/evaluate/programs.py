"""Programs that a model wrote, run against their tests, and pass@k (arXiv:2107.03374, section 2.1).

A program runs as a process of this user, begun in an empty folder that is removed, without this process's environment,
with limits on its time, memory and the size of a file it writes, and without a network where the kernel lets an
ordinary user leave it. What it started ends with it. It can read and write whatever this user can: that stops
accidents, not an adversary.
"""

from __future__ import annotations

import math
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache
from tempfile import TemporaryDirectory, TemporaryFile

SECONDS = 10
MEMORY = 1 << 30
WRITES = 1 << 20


def passes(program: str, tests: str) -> bool:
    """Whether a Python program gets through the tests after it. One that ends before their end does not."""
    through = secrets.token_hex(16)
    with TemporaryDirectory() as folder, TemporaryFile() as said, TemporaryFile() as written:
        # The first line has the say on the encoding: a model's own word on it counts for nothing.
        text = f"# coding: utf-8\n{program}\n\n{tests}\nimport os as _os\n_os.write(1, b'\\n{through}')\n"
        written.write(text.encode("utf-8", "surrogatepass"))
        written.seek(0)
        place = f"/dev/fd/{written.fileno()}"  # tests may be longer than a command's words can be
        process = subprocess.Popen(
            [*_apart(), sys.executable, "-I", "-S", place], cwd=folder, env={}, stdin=subprocess.DEVNULL, stdout=said,
            stderr=subprocess.DEVNULL, start_new_session=True, preexec_fn=_limit, pass_fds=(written.fileno(),),
        )  # fmt: skip
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started, too
        process.wait()
        said.seek(0)
        return process.returncode == 0 and said.read().endswith(through.encode())


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
