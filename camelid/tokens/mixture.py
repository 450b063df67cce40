"""Several token folders at once, each with its weight; the order is still a pure function of (seed, position)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import torch

from camelid.errors import InputError
from camelid.tokens.batch import Batch, PackedTokens
from camelid.tokens.order import item_at

BLOCK = 1024  # positions among which the shares are exact, but for rounding


class Mixture:
    """Draws rows from `sources` by `weights`. A source that is used up begins its next epoch."""

    def __init__(self, sources: Sequence[PackedTokens], weights: Sequence[float], seed: int) -> None:
        if len(sources) != len(weights) or not all(w > 0 for w in weights):
            raise InputError("data.weights: one number above 0 is needed for each folder of data.tokens")
        self.sources, self.seed = list(sources), seed
        total = sum(weights)
        self.shares = [w / total for w in weights]
        if min(self.shares) * BLOCK < 2:
            raise InputError(f"data.weights: the smallest is below 1/{BLOCK // 2} of the sum")
        self._edges = [0.0, *itertools.accumulate(self.shares)]
        self._edges[-1] = 1.0

    def __len__(self) -> int:
        """Positions until every source has been read once."""
        return max(self._end(number) for number in range(len(self.sources)))

    def _end(self, number: int) -> int:
        """Positions until a source has been read once."""
        size = len(self.sources[number])
        block = max(0, int(size / self.shares[number] / BLOCK) - 1)
        while self._counts(block + 1)[number] < size:
            block += 1
        left = size - self._counts(block)[number]
        own = [index for index, source in enumerate(self._sources_of(block)) if source == number]
        return block * BLOCK + own[left - 1] + 1

    def place(self, position: int) -> tuple[int, int]:
        """(source, position in that source) of a position: a source is read in its own order."""
        block, index = divmod(position, BLOCK)
        sources = self._sources_of(block)
        return sources[index], self._counts(block)[sources[index]] + sources[:index].count(sources[index])

    def _sources_of(self, block: int) -> list[int]:
        """The source of each position of a block."""
        before, after = self._counts(block), self._counts(block + 1)
        return _shuffled(hash_of(self.seed, block), tuple(b - a for a, b in zip(before, after, strict=True)))

    def _counts(self, block: int) -> list[int]:
        """How many positions of the first `block` blocks each source has."""
        edges = [int(edge * block * BLOCK + 0.5) for edge in self._edges]
        return [b - a for a, b in itertools.pairwise(edges)]

    def batch(self, position: int, rows: int) -> Batch:
        """The `rows` sequences from `position` on."""
        parts = []
        for at in range(position, position + rows):
            source, own = self.place(at)
            parts.append(self.sources[source].batch(own, 1))
        return Batch(
            torch.cat([p.input_ids for p in parts]),
            torch.cat([p.labels for p in parts]),
            torch.cat([p.document_ids for p in parts]),
            one_document=all(p.one_document for p in parts),
        )


@lru_cache(maxsize=64)  # of the blocks that the threads of a loader are in
def _shuffled(seed: int, counts: tuple[int, ...]) -> list[int]:
    """Each source as often as its count, in an order that the seed decides."""
    slots = [number for number, count in enumerate(counts) for _ in range(count)]
    return [slots[item_at(index, len(slots), seed)] for index in range(len(slots))]


def hash_of(seed: int, block: int) -> int:
    """A seed for one block's order."""
    return (seed * 1_000_003 + block) & ((1 << 63) - 1)
