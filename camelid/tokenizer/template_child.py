"""Chat templates in a process of their own. The sandbox of `template.py` keeps a template from files and functions, not
from the processor and the memory: this one is killed when a text takes too long, and the next text gets a new one.

One JSON object a line: {"template", "messages", "variables"} in, {"text"} or {"fault"} out.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING, Any

from camelid import child
from camelid.errors import FormatError
from camelid.tokenizer.template import Message, render

if TYPE_CHECKING:
    from camelid.tokenizer.tokenizer import Tokenizer

SECONDS = 5.0
MEMORY = 512 * 2**20
ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")
START = f"from {__name__} import main; main(float(sys.argv[1]), int(sys.argv[2]))"


def can_be_limited() -> bool:
    """Whether this system has what limits the child: alarms and resource limits (not Windows)."""
    return hasattr(signal, "setitimer")


def limited(words: Tokenizer, seconds: float) -> TemplateChild | None:
    """Have a tokenizer's chat template applied in a child from now on, which the caller closes; None where there is no
    template, or no limit."""
    if words.chat_template is None or not can_be_limited():
        return None
    words.renderer = made = TemplateChild(seconds)
    return made


class Ended(FormatError):
    """The child was closed: the server ends."""


class TemplateChild:
    """Renders like `render`, for any thread, in a child that has `seconds` for a text and `memory` bytes in all."""

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self._seconds, self._memory, self._lock = seconds, memory, Lock()
        self._child: subprocess.Popen[bytes] | None = self._started()
        self._closed = False

    def __call__(self, template: str, messages: Sequence[Message], **variables: Any) -> str:
        """As `render`; FormatError also for a text that took too long or too much."""
        wish = {"template": template, "messages": list(messages), "variables": variables}
        line = json.dumps(wish, allow_nan=True).encode() + b"\n"
        with self._lock:
            answer = self._asked(line)
        if self._closed:
            raise Ended("no chat template is applied any more: the server ends")
        if not answer:
            raise FormatError(
                f"the chat template was stopped: it has {self._seconds:g} s and {self._memory >> 20} MiB for a text"
            )
        found = json.loads(answer)
        if "fault" in found:
            raise FormatError(found["fault"])
        text: str = found["text"]
        return text

    def _asked(self, line: bytes) -> bytes:
        """The child's answer, empty when it died over the question. A child that died before is replaced."""
        if self._closed:
            return b""
        if self._child is None or self._child.poll() is not None:
            self._end()
            self._child = self._started()
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(line)
            self._child.stdin.flush()
            answer = self._child.stdout.readline()
        except OSError:
            answer = b""
        if not answer.endswith(b"\n"):
            self._end()
            return b""
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        words = child.python(START, str(self._seconds), str(self._memory))
        known = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}  # no key, no token
        # Off the terminal's group: Ctrl-C is for the server, which then closes this one.
        return subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=known, start_new_session=True
        )  # fmt: skip

    def _end(self) -> None:
        ended, self._child = self._child, None
        if ended is not None:
            ended.kill()
            ended.wait()
            for pipe in (ended.stdin, ended.stdout):
                if pipe is not None:
                    pipe.close()

    def close(self) -> None:
        """End the child at once, whatever it is at; nothing is rendered afterwards."""
        self._closed = True
        if (running := self._child) is not None:
            running.kill()
        with self._lock:
            self._end()


def main(seconds: float, memory: int) -> None:
    """Answer until the pipe is closed. The alarm's usual effect is wanted: it ends the process, whatever it is at."""
    import resource

    with suppress(ValueError, OSError):  # macOS does not limit what is mapped; the alarm remains
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # answers only go where answers are read
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            wish = json.loads(line)
            answer = json.dumps({"text": render(wish["template"], wish["messages"], **wish["variables"])})
        except (FormatError, MemoryError) as error:
            answer = json.dumps({"fault": str(error) or "the chat template needs too much memory"})
        out.write(answer.encode() + b"\n")
        out.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)
