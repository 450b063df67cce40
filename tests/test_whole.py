"""The suite tests all that it says: its oracles are installed, the native library is that of these sources, and nothing
asks a network."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from camelid.kernels.library import PATH, library

ROOT = Path(__file__).parents[1]


def test_every_oracle_is_installed() -> None:
    """Else its tests would be skipped without a word that anybody reads."""
    asked = importlib.metadata.requires("camelid") or []
    names = [re.split(r"[^\w.-]", line)[0] for line in asked if re.search(r"extra == ['\"]test['\"]", line)]
    assert len(names) > 10
    for name in names:
        assert importlib.metadata.version(name), name


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler here")
def test_the_native_library_is_that_of_the_sources() -> None:
    """A source that does not compile leaves the library of before, or none, and every native test would be skipped."""
    assert library() is not None
    newest = max((ROOT / "native").iterdir(), key=lambda source: source.stat().st_mtime)
    assert PATH.stat().st_mtime > newest.stat().st_mtime, (
        f"{newest.name} is newer than the library: make .venv/.ready-test"
    )


def test_nothing_asks_a_network() -> None:
    nobody = ("192.0.2.1", 9)  # RFC 5737
    with pytest.raises(AssertionError, match="reached for the network"), suppress(OSError):
        socket.create_connection(nobody, timeout=0.01)
    with pytest.raises(AssertionError, match="reached for the network"), suppress(OSError):
        socket.getaddrinfo("example.org", 80)
    program = f"import socket; socket.create_connection({nobody}, timeout=0.01)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "a test reached for the network" in done.stderr
