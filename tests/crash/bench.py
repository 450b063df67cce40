"""One verb on a disk that fails: what it is run on, what must be left of it, and how a run on a bad disk is played."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camelid.artifact import MANIFEST, damage

from ..life import VERBS

FAULTS = ("die", "half", "power", "blank", "ENOSPC", "EIO")  # "blank": a power cut after which names are there
_CODES = {"die": 0, "half": 1, "power": 0, "blank": 0, "ENOSPC": 2, "EIO": 3}
KILLED = -9


@dataclass(frozen=True)
class Verb:
    """A command (life.VERBS), and `made`: the files of its output that must be the same, however it came about.

    `older`, a part of the command and what stands in its place, makes another output of the same name first, which must
    not be lost.
    """

    name: str
    made: str
    older: tuple[str, str] | None = None
    resume: bool = False  # goes on with --resume once a checkpoint is there
    folder: bool = True

    def words(self, out: Path, inputs: Path, older: bool = False) -> list[str]:
        begun = self.resume and any((out / "checkpoints").glob(f"step-*/{MANIFEST}"))
        command = VERBS[self.name].replace(*self.older) if older and self.older else VERBS[self.name]
        return [*command.format(out=out, inputs=inputs).split(), "--json", *(["--resume"] if begun else [])]


class Server:
    """The warm process that forks commands (server.py)."""

    def __init__(self, shim: Path, scratch: Path) -> None:
        self.scratch = scratch
        scratch.mkdir()
        environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment, cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def _ask(self, wish: dict[str, Any]) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(wish) + "\n")
        self._process.stdin.flush()
        status: int = json.loads(self._process.stdout.readline())
        return status

    def run(self, command: Sequence[str], root: Path, at: int = 0, fault: str = "die") -> Ended:
        wish = {
            "command": command, "root": str(root), "at": at, "fault": _CODES[fault],
            **{name: str(self.scratch / name) for name in ("stdout", "stderr", "log")},
        }  # fmt: skip
        code = self._ask(wish)
        done = [tuple(line.split("\t")) for line in (self.scratch / "log").read_text().splitlines()]
        return Ended(code, (self.scratch / "stdout").read_text(), (self.scratch / "stderr").read_text(), done)

    def warm(self, command: Sequence[str]) -> None:
        """Import what a command imports, so that its next children need not."""
        modules = self.scratch / "modules"
        wish = {
            "command": command,
            "modules": str(modules),
            "stdout": os.devnull,
            "stderr": str(self.scratch / "stderr"),
        }
        assert self._ask(wish) == 0, (self.scratch / "stderr").read_text()
        self._ask({"import": json.loads(modules.read_text())})

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str
    log: list[tuple[str, ...]]  # (operation, path, target), failed ones as ("failed", path, operation)


def cut_the_power(root: Path, log: Sequence[tuple[str, ...]], before: set[str], names: bool) -> None:
    """What was never settled is lost: bytes of files, and with `names` those of files and folders. `before` are files
    that were there, settled."""
    settled, loose = set(before), list[tuple[str, str, str]]()
    for name, path, target in log:
        if name == "fsync":
            settled.add(path)
            for one in [one for one in loose if os.path.dirname(one[2] or one[1]) == path]:
                loose.remove(one)
                if one[2]:
                    loose = [(n, *(_moved(p, *one) for p in paths)) for n, *paths in loose]
        elif name in ("write", "truncate"):
            settled.discard(path)
        elif name in ("create", "mkdir"):
            settled.discard(path)
            loose.append((name, path, ""))
        elif name in ("rename", "exchange"):
            loose.append((name, path, target))
            if name == "rename":
                settled -= {p for p in settled if _below(p, target)}
            settled = {_moved(p, name, path, target) for p in settled}
    for file in root.rglob("*"):
        if file.is_file() and str(file) not in settled:
            file.write_bytes(b"")
    for name, old, new in reversed(loose if names else []):
        if name == "exchange" and os.path.exists(old) and os.path.exists(new):
            os.rename(old, f"{old}.swap")
            os.rename(new, old)
            os.rename(f"{old}.swap", new)
        elif name == "rename" and os.path.exists(new) and os.path.isdir(os.path.dirname(old)):
            if not os.path.exists(old):
                os.rename(new, old)
        elif name == "mkdir":
            shutil.rmtree(old, ignore_errors=True)
        elif name == "create" and os.path.exists(old):
            os.unlink(old)


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def _moved(path: str, name: str, old: str, new: str) -> str:
    """Where a path is after a rename or an exchange."""
    if _below(path, old):
        return new + path[len(old) :]
    return old + path[len(new) :] if name == "exchange" and _below(path, new) else path


def content(verb: Verb, out: Path) -> dict[str, bytes] | None:
    """The files that count, None without a finished output."""
    if not verb.folder:
        return {"": out.read_bytes()} if out.is_file() else None
    if verb.resume:
        finished = sorted((out / "checkpoints").glob(f"step-*/{MANIFEST}"))
        folder = finished[-1].parent if finished else out
    else:
        folder = out
    if not (folder / MANIFEST).is_file():
        return None
    return {str(p.relative_to(folder)): p.read_bytes() for pattern in verb.made.split() for p in folder.glob(pattern)}


def whole(verb: Verb, out: Path) -> str | None:
    """What is wrong with the output that is there."""
    if not verb.folder:
        return None
    folders = [p.parent for p in (out / "checkpoints").glob(f"*/{MANIFEST}")] if verb.resume else [out]
    return next((wrong for folder in folders if folder.exists() and (wrong := damage(folder))), None)


def files(root: Path) -> set[str]:
    return {str(p) for p in root.rglob("*") if p.is_file()}


def copied(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
