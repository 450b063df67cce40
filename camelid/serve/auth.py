"""Who may ask. Every path needs a key when there are keys, but those of `OPEN`; every request must name a host that
this server is called by, so that a web page elsewhere cannot reach it under a name of its own."""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from collections.abc import Iterable
from pathlib import Path

from starlette.types import Scope

from camelid.errors import InputError
from camelid.serve.faults import Fault

PAGE = ("page.js", "page.css", "words.js", "marks.js", "glass.js", "ask.js")
OPEN = frozenset({"/health", "/", *(f"/page/{name}" for name in PAGE)})
LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]", "::1"})
SHORTEST_KEY = 16
FAILURES_A_MINUTE = 60


class Keys:
    """Keys by their SHA-256; compared in constant time, all of them every time. Without any, nothing is asked."""

    def __init__(self, file: Path | None = None, variable: str = "CAMELID_API_KEY") -> None:
        self._file, self._variable = file, variable
        self._hashes: list[bytes] = []
        self._failures: list[float] = []
        self.reload()

    def reload(self) -> None:
        """Read the file (a key a line, # for remarks) and the environment again. Raises InputError."""
        lines: list[str] = []
        if self._file is not None:
            try:
                lines = self._file.read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{self._file}: no API keys can be read: {error}") from None
        lines.append(os.environ.get(self._variable, ""))
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        short = next((key for key in keys if len(key) < SHORTEST_KEY), None)
        if short is not None:
            raise InputError(f"an API key has {len(short)} characters: at least {SHORTEST_KEY} are needed")
        if self._file is not None and not keys:
            raise InputError(f"{self._file}: it holds no API key")
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def check(self, scope: Scope) -> str:
        """The caller's name for the cache, which nobody else has. Raises Fault(401)."""
        if not self._hashes or scope["path"] in OPEN:
            return ""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._hashes]
        if scheme.lower() != b"bearer" or not any(matches):
            raise self._refusal()
        return digest.hex()

    def _refusal(self) -> Fault:
        now = time.monotonic()
        self._failures = [at for at in self._failures if now - at < 60][-FAILURES_A_MINUTE:]
        if len(self._failures) >= FAILURES_A_MINUTE:
            return Fault(429, "too many requests without a valid API key", code="rate_limit_exceeded", retry_after=60)
        self._failures.append(now)
        return Fault(401, "the API key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key")


def check_host(scope: Scope, allowed: Iterable[str]) -> None:
    """Raises Fault unless the request names exactly one host, and one of the allowed. "*" allows all."""
    hosts = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
    allowed = set(allowed)
    if len(hosts) != 1:
        raise Fault(400, "a request names one host", code="invalid_host")
    name = hosts[0].rpartition(":")[0] if hosts[0].rpartition(":")[2].isdecimal() and ":" in hosts[0] else hosts[0]
    if "*" not in allowed and name not in allowed and name.strip("[]") not in allowed:
        raise Fault(403, "this server is not called by that host (see --allowed-host)", code="invalid_host")
