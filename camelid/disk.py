"""Bytes and names on their way to the disk: whole, settled, and in one step; and JSON files on their way back.

A file is written, settled (fsync), and then named; what stood under the name before is replaced and never missing. What
is being made lies beside its place under a name of its own, locked, so that what a killed process left can be told.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from camelid.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError naming the file, and the line at fault."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # nesting, and numbers of thousands of digits, among them
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def is_json(text: str | bytes) -> bool:
    """Whether it is one JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


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
    """Replace `path` by `text` (UTF-8) in one step: a reader sees the old file or the new one. Of a name that is not
    UTF-8 the bytes are escaped, as JSON does."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_file(temporary, [text.encode("utf-8", "backslashreplace")])
    os.replace(temporary, path)


def settle(path: Path) -> None:
    """Bring a file's bytes, or the names in a folder, down to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network and shared file systems cannot do it for a folder
        if error.errno not in (errno.EINVAL, errno.EBADF) or not path.is_dir():
            raise
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
def scratch_beside(out: Path, folder: bool) -> Iterator[Path]:
    """A new empty folder or file beside `out`, locked; what is under its name when the block ends is removed.

    What a killed process left beside `out` is dealt with first: it holds no lock.
    """
    make_folder(out.parent)
    _tidy(out)
    scratch, lock = _held(out, folder)
    try:
        yield scratch
    finally:
        os.close(lock)
        _remove(scratch)


def _held(out: Path, folder: bool) -> tuple[Path, int]:
    """A scratch name of its own, and the descriptor that locks it."""
    while True:
        scratch = out.with_name(f".{out.name}.{os.getpid()}-{token_hex(4)}.making")
        if folder:
            scratch.mkdir()
        else:
            scratch.touch(exist_ok=False)
        try:
            descriptor = os.open(scratch, os.O_RDONLY)
        except FileNotFoundError:  # tidied away by another process before it could be locked
            continue
        if _lock(descriptor) is not False and scratch.exists():
            return scratch, descriptor
        os.close(descriptor)


def _tidy(out: Path) -> None:
    """Remove what killed processes left of making `out`, and put back an output that one had moved aside."""
    left = re.compile(rf"\.{re.escape(out.name)}\.\d+-[0-9a-f]{{8}}\.(making|aside)")
    for path in list(out.parent.iterdir()):
        found = left.fullmatch(path.name)
        if not found:
            continue
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if _lock(descriptor):
                    if found[1] == "aside" and not out.exists():
                        os.rename(path, out)
                    else:
                        _remove(path)
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Take the lock of an open file or folder: False when another has it, None where there are no locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def new_file(out: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write a file beside `out`, piece by piece, and give it that name when it is whole. Returns its SHA-256."""
    out = out.resolve()
    with scratch_beside(out, folder=False) as scratch:
        digest = write_file(scratch, parts)
        os.replace(scratch, out)
        settle(out.parent)
    return digest


def take_name(new: Path, out: Path) -> None:
    """Give a folder the name `out`; one that is there gets the name of the new one."""
    if not out.exists():
        try:
            os.rename(new, out)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # somebody else's came first
                raise
    exchange(new, out)


def exchange(new: Path, old: Path) -> None:
    """Two folders take each other's names, in one step where the system can (Linux's renameat2). Elsewhere the old one
    is moved aside first; should the process end right then, the next one under its name puts it back."""
    here, exchanging = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 and renameat2(here, os.fsencode(new), here, os.fsencode(old), exchanging) == 0:
        return
    aside, held = new.with_suffix(".aside"), os.open(old, os.O_RDONLY)
    try:
        _lock(held)  # nobody else tidies it away meanwhile
        os.rename(old, aside)
        try:
            os.rename(new, old)
        except OSError:
            os.rename(aside, old)
            raise
        os.rename(aside, new)
    finally:
        os.close(held)
