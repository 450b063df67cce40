"""Which documents a tokenizer learns from when the corpus is larger than it can hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass
class Sample:
    """Lets a share of documents through, chosen by their number alone, and counts both sides.

    share: 1.0 lets all through.
    """

    share: float
    documents: int = 0
    bytes: int = 0
    documents_used: int = 0
    bytes_used: int = 0

    def __call__(self, texts: Iterable[str]) -> Iterator[str]:
        for number, text in enumerate(texts):
            size = len(text.encode("utf-8", "replace"))
            self.documents += 1
            self.bytes += size
            if self.share >= 1 or _fraction(number) < self.share:
                self.documents_used += 1
                self.bytes_used += size
                yield text

    def to_dict(self) -> dict[str, float]:
        return dict(vars(self))


def _fraction(number: int) -> float:
    """A number in [0, 1) that looks random and is always the same."""
    return int.from_bytes(hashlib.blake2b(str(number).encode(), digest_size=6).digest(), "big") / (1 << 48)
