"""Find and load the native library. Built by hatch_build.py when a C++ compiler is at hand; never required."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

ABI = 14
PATH = Path(__file__).parent / "libcamelid.so"


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library; None when it was not built, is of another version, or CAMELID_NATIVE=0 switches it off."""
    if os.environ.get("CAMELID_NATIVE") == "0" or not PATH.exists():
        return None
    try:
        loaded = ctypes.CDLL(str(PATH))
        return loaded if loaded.camelid_abi() == ABI else None
    except (OSError, AttributeError):
        return None


def describe() -> str:
    """One line for `camelid info`."""
    if library() is not None:
        return f"native library {PATH.name}"
    why = "of another version, or not for this system" if PATH.exists() else "not built"
    why = "switched off by CAMELID_NATIVE=0" if os.environ.get("CAMELID_NATIVE") == "0" else why
    return f"Python reference (native library {why}; with a C++ compiler, reinstalling builds it)"
