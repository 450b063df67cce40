"""What one request may cost, and how a body is read within that."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from camelid.serve.faults import Fault


@dataclass(frozen=True)
class Limits:
    """Defaults that keep one caller from harming the others. Times in seconds, sizes in bytes."""

    body: int = 4 << 20
    headers: int = 64 << 10
    depth: int = 64
    requests: int = 128  # at once
    queue: int = 256  # texts that wait or run
    header_time: float = 10
    body_time: float = 30
    write_time: float = 30
    request_time: float = 600
    template_time: float = 5  # to render one conversation
    grace_time: float = 30  # for open streams after SIGTERM


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """The body as a JSON object. Raises Fault for one that is too large, too slow, too deep or not JSON."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Fault(415, "the body must be sent as content-type application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Fault(415, "a compressed body is not read", code="unsupported_encoding")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limits.body):
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_time):
            async for part in request.stream():
                body += part
                if len(body) > limits.body:
                    raise _too_large(limits)
    except TimeoutError:
        raise Fault(408, f"the body did not arrive within {limits.body_time:g} s", code="request_timeout") from None
    return parse(bytes(body), limits.depth)


def _too_large(limits: Limits) -> Fault:
    return Fault(413, f"the body is larger than {limits.body:,} bytes", code="request_too_large")


def parse(body: bytes, depth: int = Limits.depth, what: str = "the body") -> dict[str, Any]:
    """An object in strict JSON: no NaN, no key twice, no half of a surrogate pair, no nesting beyond `depth`."""
    try:
        value = json.loads(
            body.decode("utf-8"), parse_constant=_no_constant, parse_float=finite_number,
            object_pairs_hook=_no_key_twice,
        )  # fmt: skip
    except RecursionError:
        raise Fault(400, f"{what} is nested more than {depth} deep", code="invalid_json") from None
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, a number of thousands of digits, and ours
        reason = str(error) if isinstance(error, json.JSONDecodeError | _Refused) else "not UTF-8, or no number"
        raise Fault(400, f"{what} is not JSON: {reason}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Fault(400, f"{what} must be a JSON object", code="invalid_json")
    _walk(value, depth, what)
    return value


class _Refused(ValueError):
    pass


def _no_constant(name: str) -> None:
    raise _Refused(f"{name} is not a JSON number")


def finite_number(text: str) -> float:
    """Raises ValueError for one that no float holds."""
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _Refused("a number is too large")
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Refused("an object has a key twice")
    return found


def _walk(value: Any, depth: int, what: str) -> None:
    level = [value]
    for _ in range(depth):
        deeper: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                deeper += one.keys()
                deeper += one.values()
            elif isinstance(one, list):
                deeper += one
            elif isinstance(one, str) and not is_unicode(one):
                raise Fault(400, f"a string in {what} holds half of a surrogate pair", code="invalid_json")
        if not deeper:
            return
        level = deeper
    raise Fault(400, f"{what} is nested more than {depth} deep", code="invalid_json")


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
