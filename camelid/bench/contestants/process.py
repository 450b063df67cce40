"""What contestants share about their own process: how much memory it took, and that freed memory is kept."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}


def keep_memory() -> None:
    """Begin again with an allocator that gives nothing back: the best that peers' users know of."""
    if "MALLOC_MMAP_MAX_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT)


def peak_bytes() -> int:
    """Of this process alone: what getrusage tells begins with the parent's."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux: then getrusage, in bytes on macOS
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
