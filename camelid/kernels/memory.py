"""How much memory there is, in which pages, and what the C library does with large freed blocks. By its default they go
back to the kernel, and every page is zeroed again at the next step; kept, a step is faster, and the gaps between blocks
cost a quarter to two thirds more. Under activation checkpointing, where memory is what matters, each block has pages of
its own and there are no gaps (docs/decisions.md has the figures)."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4  # malloc.h
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 64 << 20}
GIVEN_BACK = {MMAP_MAX: 65536, MMAP_THRESHOLD: 1 << 20}
LARGE = 2 << 20
GROUPS, LIMITS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
DEFAULTS = {MMAP_MAX: 65536, MMAP_THRESHOLD: 128 << 10, TRIM_THRESHOLD: 128 << 10, TOP_PAD: 128 << 10}


def installed() -> int:
    """Bytes of memory that this machine has, or that its container, service or job may use if that is less."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in _limits():
        with suppress(OSError, ValueError):  # "max" is no number
            found = min(found, int(limit.read_text(encoding="ascii")))
    return found


def _limits() -> list[Path]:
    """Where the limits of this process's control group may stand, and of those around it: version 2, and 1."""
    try:
        lines = GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = [LIMITS / "memory.max", LIMITS / "memory/memory.limit_in_bytes"]  # of a container that sees no others
    for line in lines:
        _, kinds, place = line.split(":", 2)
        group = Path(place.lstrip("/"))
        if not kinds:
            found += [LIMITS / part / "memory.max" for part in (group, *group.parents)]
        elif "memory" in kinds.split(","):
            found += [LIMITS / "memory" / part / "memory.limit_in_bytes" for part in (group, *group.parents)]
    return found


def large_pages(size: int) -> Tensor:
    """uint8 [size] of zeros that cost nothing until they are written, from the beginning of a page of 2 MiB on, in such
    pages where the kernel has them. Of ordinary ones a CPU's fetching ahead ends every 4 KiB, and where a page lies is
    asked for that often: in a virtual machine that costs a fifth to a third of the memory's speed (docs/decisions.md).
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return torch.zeros(size, dtype=torch.uint8, device="cpu")
    memory = mmap.mmap(-1, size + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a forked process has its own
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    room = torch.frombuffer(memory, dtype=torch.uint8)
    skip = -room.data_ptr() % LARGE
    return room[skip : skip + size]


def give_back() -> None:
    """What was freed and kept goes back to the kernel, where the C library is glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def let_go(numbers: Tensor) -> None:
    """The whole pages of a contiguous tensor on the CPU that nobody looks at again go back to the kernel at once, where
    that is Linux; what they held is lost, but for a file's."""
    if sys.platform != "linux" or numbers.device.type != "cpu":
        return
    begin = -(-numbers.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = (numbers.data_ptr() + numbers.nbytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    if whole > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(whole), ctypes.c_int(mmap.MADV_DONTNEED))


@contextmanager
def large_blocks(kept: bool) -> Iterator[bool]:
    """While the block runs, freed blocks of a megabyte and more stay with the process, or leave it at once. False where
    the C library is not glibc and does as it does."""
    if platform.libc_ver()[0] != "glibc":
        yield False
        return
    libc = ctypes.CDLL(None)
    answers = [libc.mallopt(name, value) for name, value in (KEPT if kept else GIVEN_BACK).items()]
    try:
        yield all(answers)
    finally:
        for name, value in DEFAULTS.items():
            libc.mallopt(name, value)
        give_back()
