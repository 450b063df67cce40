"""Bytes and names on their way to the disk: whole, settled, and in one step.

A file is written, settled (fsync), and then named; what stood under the name before is replaced and never missing. What
is being made lies beside its place under a name of its own, locked, so that what a killed process left can be told.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write `path` piece by piece, down to the disk. Returns the SHA-256 of what was written."""
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for part in parts:
            digest.update(part)
            left = memoryview(part).cast("B")
            while left:
                left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def write_array(path: Path, array: NDArray[Any]) -> str:
    """Write an array in NumPy's format, down to the disk. Returns the SHA-256 of the file."""
    from numpy import ascontiguousarray
    from numpy.lib import format as npy

    array = ascontiguousarray(array)
    head = BytesIO()
    npy.write_array_header_1_0(head, npy.header_data_from_array_1_0(array))
    return write_file(path, [head.getvalue(), array.data] if array.size else [head.getvalue()])


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one step: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_file(temporary, [text.encode()])
    os.replace(temporary, path)


def settle(path: Path) -> None:
    """Bring a file's bytes, or the names in a folder, down to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that their names outlast a power cut."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    if missing:
        path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        settle(folder.parent)


@contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """The name of a scratch file or folder beside `out`; what is still under it when the block ends is removed.

    What a killed process left there is removed too: it holds no lock.
    """
    make_folder(out.parent)
    for old in out.parent.glob(f".{escape(out.name)}.*.making"):
        with suppress(OSError), locked(old):
            _remove(old)
    scratch = out.with_name(f".{out.name}.{os.getpid()}.making")
    try:
        yield scratch
    finally:
        _remove(scratch)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file or folder. Raises OSError when another process does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def new_file(out: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write a file beside `out`, piece by piece, and give it that name when it is whole. Returns its SHA-256."""
    with scratch_beside(out) as scratch:
        scratch.touch()
        with locked(scratch):
            digest = write_file(scratch, parts)
            os.replace(scratch, out)
            settle(out.parent)
    return digest


def exchange(new: Path, old: Path) -> None:
    """Two folders take each other's names, in one step where the system can (Linux's renameat2)."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 and renameat2(here, os.fsencode(new), here, os.fsencode(old), exchange) == 0:
        return
    aside = new.with_suffix(".old.making")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise
    os.rename(aside, new)
