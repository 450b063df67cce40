"""Every route wants a key, by whatever name it is asked for; nothing is asked by a host that is not ours."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from camelid.errors import InputError
from camelid.generate.engine import Engine
from camelid.serve.app import KNOWN, POSTS
from camelid.serve.auth import OPEN, Keys

from .conftest import CHAT, HELLO, Running, serving

KEY, SECOND = "correct-horse-battery", "staple-of-the-second-user"
GUARDED = sorted({*KNOWN, "/v1/models/tiny"} - OPEN)


@pytest.fixture(scope="module")
def guarded(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text(f"# of the test\n{KEY}\n\n{SECOND}\n")
    with serving(engine, Keys(file, "CAMELID_NO_KEY")) as server:
        yield server


def ask(server: Running, path: str, headers: list[tuple[str, str]], method: str) -> int:
    """The status, of a request written by hand: no client tidies it."""
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "Content-Length: 0", "", ""]
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as link:
        link.sendall("\r\n".join(lines).encode("latin-1"))
        reply = link.recv(65536)
    return int(reply.split()[1]) if reply else 0


def evasions(path: str) -> Iterator[tuple[str, list[tuple[str, str]], str]]:
    """(path, headers, method) that must not pass without a key."""
    host = ("Host", "127.0.0.1")
    method = "POST" if path in POSTS else "GET"
    for keys in (
        [], [("Authorization", "")], [("Authorization", "Bearer")], [("Authorization", "Bearer ")],
        [("Authorization", f"Bearer {KEY}x")], [("Authorization", f"Bearer {KEY[:-1]}")], [("Authorization", KEY)],
        [("Authorization", f"Basic {KEY}")], [("Authorization", f"Bearer {KEY.upper()}")],
        [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")],
        [("Authorization", "Bearer wrong-wrong-wrong-wrong"), ("Authorization", f"Bearer {KEY}")],
        [("Authorization", f"Bearer {KEY} {KEY}")], [("Authorization", f"Bearer {KEY}, {SECOND}")],
        [("Proxy-Authorization", f"Bearer {KEY}")], [("X-Api-Key", KEY)], [("Cookie", f"key={KEY}")],
        [("Api-Key", KEY)], [("X-Forwarded-For", "127.0.0.1")], [("X-Real-IP", "127.0.0.1")],
        [("X-Forwarded-Host", "localhost")], [("X-Forwarded-Prefix", "/health")], [("X-Original-URL", "/health")],
        [("X-Rewrite-URL", "/health")], [("X-Forwarded-Proto", "https")], [("Forwarded", "for=127.0.0.1")],
        [("X-HTTP-Method-Override", "OPTIONS")], [("Origin", "http://127.0.0.1")], [("Referer", "/health")],
        [("Upgrade", "websocket"), ("Connection", "Upgrade")], [("Upgrade", "h2c"), ("Connection", "Upgrade")],
    ):  # fmt: skip
        yield path, [host, *keys], method
    for other in ("HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "get", "POST" if method == "GET" else "GET"):
        yield path, [host], other
    for named in (
        "127.0.0.1/health?",
        "localhost#/health",
        "evil.example",
        "127.0.0.1:80/health",
        "health",
        "localhost@evil",
    ):
        yield path, [("Host", named)], method
    yield path, [host, host], method
    yield path, [], method
    for way in (
        f"/{path}", f"{path}/", f"{path}?a=/health", f"{path};/health", f"/health/..{path}", f"/health/../..{path}",
        f"/.{path}", path.replace("/", "/%2e/", 1), path.replace("/", "%2f"), f"http://127.0.0.1{path}",
        f"http://127.0.0.1/health{path}", f"{path}%00", f"{path}%20", f"{path}#/health", f"/page/page.js/..{path}",
        path.upper(), path.replace("o", "%6f"), f"//127.0.0.1{path}",
    ):  # fmt: skip
        yield way, [host], method


def test_no_evasion_passes(guarded: Running) -> None:
    tried = 0
    guarded.service.keys._failures.clear()
    for path in GUARDED:
        for way, headers, method in evasions(path):
            status = ask(guarded, way, headers, method)
            assert status in (0, 400, 401, 403, 404, 405, 429), (way, headers, method, status)
            tried += 1
    assert tried >= 60 * len(GUARDED)


def test_a_key_opens_what_a_wrong_one_does_not(guarded: Running) -> None:
    for key in (KEY, SECOND):
        answer = httpx.post(guarded.base + CHAT, json=HELLO, headers={"authorization": f"Bearer {key}"}, timeout=30)
        assert answer.status_code == 200
    for path in sorted(OPEN):
        assert httpx.get(guarded.base + path).status_code == 200
    assert httpx.get(f"{guarded.base}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403), ("evil.example:80", 403), ("127.0.0.1.evil.example", 403), ("localhost.", 403),
        ("127.0.0.1", 200), ("localhost:80", 200), ("LOCALHOST", 200), ("[::1]:80", 200),
    ],
)  # fmt: skip
def test_a_page_elsewhere_does_not_reach_it_under_a_name_of_its_own(running: Running, host: str, status: int) -> None:
    """Without keys too: a name that is made to lead to this machine (DNS rebinding) is not one that it is called by."""
    for path in ("/v1/models", "/", "/health"):
        assert ask(running, path, [("Host", host)], "GET") == status, path


def test_wrong_keys_are_slowed(guarded: Running) -> None:
    guarded.service.keys._failures.clear()
    statuses = [ask(guarded, "/v1/models", [("Host", "localhost")], "GET") for _ in range(70)]
    assert statuses[:60] == [401] * 60
    assert statuses[60:] == [429] * 10
    assert httpx.get(f"{guarded.base}/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


def test_two_callers_share_no_pages(guarded: Running) -> None:
    """What one caller's prompt left in the cache is not found by another: its prompt is read again."""
    known = guarded.service.engine.scheduler.pages._known
    body = {**HELLO, "messages": [{"role": "user", "content": "A long secret. " * 40}]}

    def pages_of(key: str) -> int:
        before = len(known)
        assert httpx.post(guarded.base + CHAT, json=body, headers={"authorization": f"Bearer {key}"}).status_code == 200
        return len(known) - before

    assert pages_of(KEY) > 2
    assert pages_of(KEY) == 0
    assert pages_of(SECOND) > 2


def test_keys_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no API keys can be read"):
        Keys(tmp_path / "none")
    (tmp_path / "keys").write_text("short\n")
    with pytest.raises(InputError, match="at least 16"):
        Keys(tmp_path / "keys")
    (tmp_path / "keys").write_text("# nothing\n")
    with pytest.raises(InputError, match="no API key"):
        Keys(tmp_path / "keys")
    monkeypatch.setenv("CAMELID_API_KEY", KEY)
    assert Keys()
    monkeypatch.setenv("CAMELID_API_KEY", "")
    assert not Keys()


def test_a_page_elsewhere_may_ask_only_when_it_is_named(engine: Engine, tmp_path: Path) -> None:
    """One that is named: first whether it may, without a key, then with it."""
    (tmp_path / "keys").write_text(KEY)
    allowed = "access-control-allow-origin"
    with serving(engine, Keys(tmp_path / "keys", "CAMELID_NO_KEY"), origins=["https://a.example"]) as server:
        for origin, status in (("https://a.example", 204), ("https://b.example", 401)):
            answer = httpx.options(server.base + CHAT, headers={"origin": origin})
            assert (answer.status_code, answer.headers.get(allowed)) == (status, origin if status == 204 else None)
            headers = {"origin": origin, "authorization": f"Bearer {KEY}"}
            answer = httpx.post(server.base + CHAT, headers=headers, json=HELLO)
            assert (answer.status_code, answer.headers.get(allowed)) == (200, origin if status == 204 else None)
