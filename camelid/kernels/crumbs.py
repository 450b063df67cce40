"""What glibc must be told before a process begins, so that freed memory stays in one piece.

Torch asks for blocks that begin on a line of their own (posix_memalign), and glibc cuts a crumb off before each. Freed,
the crumb goes into its thread's small cache and not back to the heap; the large blocks on both its sides are then never
joined, and the next step's fit nowhere. Without that cache a training process holds 3 to 12 % less (docs/decisions.md).
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping

TUNABLES, CACHE = "GLIBC_TUNABLES", "glibc.malloc.tcache_count"
NONE_KEPT = f"{CACHE}=0"


def none_kept(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process began without the cache."""
    return platform.libc_ver()[0] == "glibc" and NONE_KEPT in environment.get(TUNABLES, "").split(":")


def begin_without() -> None:
    """Begin this process anew without the cache: the same program, arguments and process number. Nothing happens where
    the C library is not glibc, or was told how much to keep."""
    told = os.environ.get(TUNABLES, "")
    if CACHE in told or not sys.executable or platform.libc_ver()[0] != "glibc":
        return
    os.environ[TUNABLES] = f"{told}:{NONE_KEPT}".lstrip(":")
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError:  # the program was replaced meanwhile, say: it goes on with the cache
        os.environ[TUNABLES] = told
