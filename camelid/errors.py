"""The few exceptions a caller may meet. A message says what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class CamelidError(Exception):
    """The work failed for a reason that is not the caller's input. The command line exits 1."""


class InputError(CamelidError, ValueError):
    """A file, field or argument given by the caller is wrong. The command line exits 2."""


class FormatError(InputError):
    """A file does not hold what its format promises: truncated, hostile or of an unsupported kind."""


class RecipeError(InputError):
    """A recipe names an unknown key, a value of the wrong type, or an impossible combination."""


class ChecksFailed(CamelidError):
    """A model did not pass; `result` is what --json prints of it."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result

    def __reduce__(self) -> tuple[Any, ...]:
        return ChecksFailed, (str(self), self.result)


@contextmanager
def about(what: object) -> Iterator[None]:
    """An InputError from inside names what it is about, a file."""
    try:
        yield
    except InputError as error:
        kind = FormatError if isinstance(error, FormatError) else InputError
        raise kind(f"{what}: {error}") from None


class MissingExtra(InputError):
    """An optional package is needed. The message carries the pip command that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: pip install 'camelid[{extra}]'")
        self._given = (package, extra, purpose)

    def __reduce__(self) -> tuple[Any, ...]:  # it may come from another process
        return MissingExtra, self._given
