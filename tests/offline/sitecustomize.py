"""No connection leaves this machine: imported by conftest.py, and by every Python that a test starts (PYTHONPATH)."""

from __future__ import annotations

import ipaddress
import sys
from typing import Any

LOCAL = {"localhost", "", None}


def local(host: object) -> bool:
    try:
        return host in LOCAL or ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Not an OSError, which a caller may take for an ordinary failure and pass over."""
    if event == "socket.connect" and isinstance(arguments[1], tuple) and isinstance(arguments[1][0], str):
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
    else:
        return
    if not local(host):
        raise AssertionError(f"a test reached for the network: {host}")


sys.addaudithook(watch)
