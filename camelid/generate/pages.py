"""Which pages of the KV cache belong to whom. A page holds PAGE tokens of every layer; a full one may be shared by all
texts that begin with the same tokens, and stays known by its content after its last reader has left, until its room is
needed.

A page's name is a hash of its tokens and of the name before it (and of the adapter), so one lookup a page finds the
longest known beginning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from camelid.kernels.decoder import PAGE


class Pages:
    """`count` pages, by number. `taken` says what is not free: pages that are kept only because they may be asked for
    again count as free."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._readers = [0] * count
        self._names: dict[int, bytes] = {}
        self._known: dict[bytes, int] = {}
        self._idle: dict[int, None] = {}  # known, without a reader; the longest idle first

    @property
    def free(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def taken(self) -> int:
        return self.count - self.free

    def take(self) -> int:
        """A page for new tokens. Raises IndexError when none is free: ask `free` first."""
        if self._free:
            page = self._free.pop()
        elif not self._idle:
            raise IndexError("no page is free")
        else:
            page = next(iter(self._idle))
            del self._idle[page]
            del self._known[self._names.pop(page)]
        self._readers[page] = 1
        return page

    def release(self, page: int) -> None:
        """One reader less; without readers the page is free, but kept by name while its room is not needed."""
        self._readers[page] -= 1
        assert self._readers[page] >= 0
        if self._readers[page] == 0:
            if page in self._names:
                self._idle[page] = None
            else:
                self._free.append(page)

    def name(self, page: int, name: bytes) -> None:
        """Make a full page findable. Of two pages of the same content the first keeps the name."""
        if name not in self._known and page not in self._names:
            self._known[name], self._names[page] = page, name

    def known(self, names: Sequence[bytes]) -> int:
        """How many pages of a beginning are known, in a row."""
        return next((number for number, name in enumerate(names) if name not in self._known), len(names))

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The known pages of a beginning, as many in a row as there are, each with one reader more."""
        found: list[int] = []
        for name in names[: self.known(names)]:
            page = self._known[name]
            self._idle.pop(page, None)
            self._readers[page] += 1
            found.append(page)
        return found


def page_names(ids: Sequence[int], salt: str, known: Sequence[bytes] = ()) -> list[bytes]:
    """The names of all full pages of a text; `known` are those of its first pages."""
    names = list(known)
    before = names[-1] if names else hashlib.sha256(salt.encode()).digest()
    for end in range((len(names) + 1) * PAGE, len(ids) + 1, PAGE):
        tokens = b"".join(i.to_bytes(4, "little") for i in ids[end - PAGE : end])
        before = hashlib.sha256(before + tokens).digest()
        names.append(before)
    return names
