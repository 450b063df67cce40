"""Memory that is kept: glibc gives large blocks back to the kernel at every free, and training asks for them again at
every step; each page is then zeroed anew. Keeping them doubled the speed of small models on some machines
(docs/decisions.md)."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4  # malloc.h
DEFAULTS = {MMAP_MAX: 65536, TRIM_THRESHOLD: 128 << 10, TOP_PAD: 128 << 10}


@contextmanager
def kept_memory() -> Iterator[bool]:
    """While the block runs, freed memory stays with the process. False where the C library is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        yield False
        return
    libc = ctypes.CDLL(None)
    kept = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 64 << 20}
    answers = [libc.mallopt(name, value) for name, value in kept.items()]
    try:
        yield all(answers)
    finally:
        for name, value in DEFAULTS.items():
            libc.mallopt(name, value)
        libc.malloc_trim(0)
