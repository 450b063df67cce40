"""What glibc must be told before a process begins, so that freed memory stays in one piece.

Torch asks for blocks that begin on a line of their own (posix_memalign), and glibc cuts a crumb off before each. Freed,
the crumb goes into its thread's small cache and not back to the heap; the large blocks on both its sides are then never
joined, and the next step's fit nowhere. Without that cache a training process holds 2 to 12 % less (docs/decisions.md).
"""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress

TUNABLES, CACHE = "GLIBC_TUNABLES", "glibc.malloc.tcache_count"
NONE_KEPT = f"{CACHE}=0"
BEGUN = "CAMELID_BEGUN"  # the number of the process that began anew: glibc drops what it is told under set-group-ID


def none_kept() -> bool:
    """Whether this process began without the cache."""
    return platform.libc_ver()[0] == "glibc" and NONE_KEPT in os.environ.get(TUNABLES, "").split(":")


def begin_without() -> None:
    """Begin this process anew without the cache: the same program, arguments and process number. Nothing happens where
    the C library is not glibc or was told how much to keep, and to a script that was read from stdin."""
    told = os.environ.get(TUNABLES, "")
    if os.environ.pop(BEGUN, "") == str(os.getpid()) or CACHE in told or platform.libc_ver()[0] != "glibc":
        return
    if not sys.executable or sys.argv[0] in ("", "-"):
        return
    anew = {TUNABLES: f"{told}:{NONE_KEPT}".lstrip(":"), BEGUN: str(os.getpid())}
    with suppress(OSError):  # the program was replaced meanwhile, say: this one goes on
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | anew)
