"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}` on every status from 400.

Messages are ours or about the caller's own input; the text of an unforeseen exception is never sent.
"""

from __future__ import annotations

from typing import Any

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class Fault(Exception):
    """A request ends with this status. `param` is the field at fault, `code` a word for programs, `retry_after` seconds
    after which it may go well, `allow` the methods that a path takes."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        retry_after: int | None = None, allow: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.allow = retry_after, allow

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> list[tuple[bytes, bytes]]:
        extra = [(b"retry-after", str(self.retry_after).encode())] if self.retry_after else []
        extra += [(b"allow", self.allow.encode())] if self.allow else []
        if self.status == 408 or self.code == "generation_failed":  # clients of OpenAI ask again by themselves, which
            extra.append((b"x-should-retry", b"false"))  # would do the same work to the same end
        return [(b"www-authenticate", b"Bearer"), *extra] if self.status == 401 else extra


def unforeseen() -> Fault:
    return Fault(500, "the server met an error of its own; its log tells it by the x-request-id", code="internal_error")
