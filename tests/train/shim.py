"""A disk that fails where a test says: operations below a folder are counted, and one of them goes wrong."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BY_PATH, BY_DESCRIPTOR = ("open", "rename", "replace", "mkdir", "unlink", "rmdir"), ("write", "fsync")
FAULTS = ("die", "half", "power", "ENOSPC", "EIO")


class Died(BaseException):
    """The process is gone: nothing that it still tries reaches the disk."""


class Disk:
    """At operation number `at` (from 1) below `root` it does `fault`: the process dies after the operation ("die",
    "power": see `cut_the_power`) or after half of a write ("half"), or the operation fails once ("ENOSPC", "EIO")."""

    def __init__(self, patch: pytest.MonkeyPatch, root: Path, at: int = -1, fault: str = "die") -> None:
        self.root, self.at, self.fault, self.dead = root, at, fault, False
        self.done: list[tuple[str, str]] = []
        self.settled: set[str] = {str(p) for p in root.rglob("*") if p.is_file()}
        self.loose_names: list[tuple[str, str]] = []  # renames whose folder was not settled since
        for name in (*BY_PATH, *BY_DESCRIPTOR):
            patch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{args[0]}") if name in BY_DESCRIPTOR else os.fspath(args[0])
            if not str(path).startswith(str(self.root)) and kwargs.get("dir_fd") is None:
                return real(*args, **kwargs)
            if self.dead:
                raise Died
            if name == "open" and not args[1] & os.O_WRONLY:
                return real(*args, **kwargs)
            self.done.append((name, str(path)))
            bad = len(self.done) == self.at
            if bad and self.fault in ("ENOSPC", "EIO"):
                number = getattr(errno, self.fault)
                raise OSError(number, os.strerror(number))
            if bad and self.fault == "half" and name == "write":
                args = (args[0], args[1][: len(args[1]) // 2])
            try:
                found = real(*args, **kwargs)
                self._follow(name, str(path), str(args[1]) if name in ("rename", "replace") else "")
            finally:
                if bad:
                    self.dead = True
                    raise Died
            return found

        return operation

    def _follow(self, name: str, path: str, target: str) -> None:
        if name in ("write", "open"):  # to write: it may be cut, and what is added is not on the disk yet
            self.settled.discard(path)
        elif name == "fsync":
            self.settled.add(path)
            self.loose_names = [(a, b) for a, b in self.loose_names if os.path.dirname(b) != path]
        elif name in ("rename", "replace"):
            self.loose_names.append((path, target))
            moved = {p for p in self.settled if p == path or p.startswith(path + "/")}
            self.settled = self.settled - moved | {target + p[len(path) :] for p in moved}

    def cut_the_power(self) -> None:
        """What was never settled is lost: bytes of files, and new names."""
        for path in self.root.rglob("*"):
            if path.is_file() and str(path) not in self.settled:
                path.write_bytes(b"")
        for before, after in reversed(self.loose_names):
            if Path(after).exists() and not Path(before).exists() and Path(before).parent.exists():
                Path(after).rename(before)
