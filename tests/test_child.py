"""What is done in a copy of this process."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from camelid import child


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is copied")
def test_work_is_done_in_a_copy_or_here_where_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept: list[int] = []

    def work() -> int:
        kept.append(os.getpid())
        return os.getpid()

    assert child.apart(work) != os.getpid()
    assert kept == []

    def only_here() -> int:
        if os.getpid() != here:
            os.kill(os.getpid(), 9)
        return 7

    here = os.getpid()
    assert child.apart(only_here) == 7

    def slow_there() -> int:
        time.sleep(30 * (os.getpid() != here))
        return 8

    monkeypatch.setattr(child, "PATIENCE", 0.2)
    started = time.monotonic()
    assert child.apart(slow_there) == 8
    assert time.monotonic() - started < 10

    with monkeypatch.context() as full:
        full.setattr(os, "fork", lambda: (_ for _ in ()).throw(BlockingIOError(11, "no process more")))
        assert child.apart(lambda: 9) == 9

    def wrong() -> int:
        raise ValueError("as it would be here")

    with pytest.raises(ValueError, match="as it would be here"):
        child.apart(wrong)
