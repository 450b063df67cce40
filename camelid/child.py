"""Processes of our own."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = str(Path(__file__).parents[1])
PATIENCE = 120  # seconds: a copy that another thread's lock was copied into would wait for ever


def python(code: str, *words: str) -> list[str]:
    """The words that run `code`, which may import camelid, with `words` in sys.argv. Nothing is imported from the
    folder that it is started in, as `python -m` would: that folder may be a stranger's, with a json.py in it."""
    return [sys.executable, "-P", "-c", f"import sys; sys.path.append({ROOT!r}); {code}", *words]


def apart(work: Callable[[], int]) -> int:
    """What `work` answers, done in a copy of this process: what it imports and keeps is gone with it. On Linux; where
    the copy fails, and elsewhere, `work` is done here. It may compute nothing that runs on several threads."""
    if sys.platform != "linux":
        return work()
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe:
        try:
            copy = os.fork()
        except OSError:  # no process more, or no memory for one
            os.close(writing)
            return work()
        if copy == 0:
            try:
                os.write(writing, str(work()).encode())
            finally:
                os._exit(0)
        os.close(writing)
        try:
            poll = select.poll()
            poll.register(pipe, select.POLLIN | select.POLLHUP)
            answer = pipe.read() if poll.poll(1000 * PATIENCE) else b""
        finally:
            with suppress(ProcessLookupError, ChildProcessError):  # where nobody waits for processes that have ended
                os.kill(copy, signal.SIGKILL)
                os.waitpid(copy, 0)
    return int(answer) if answer else work()
