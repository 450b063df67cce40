"""Several token folders at once, each with its weight; the order is still a pure function of (seed, position)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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
        return max(round(len(source) / share) for source, share in zip(self.sources, self.shares, strict=True))

    def place(self, position: int) -> tuple[int, int]:
        """(source, position in that source) of a position."""
        block, index = divmod(position, BLOCK)
        slot = item_at(index, BLOCK, hash_of(self.seed, block))
        before, after = self._counts(block), self._counts(block + 1)
        for number in range(len(self.sources)):
            own = after[number] - before[number]
            if slot < own:
                return number, before[number] + slot
            slot -= own
        raise AssertionError("the shares of a block fill it")

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


def hash_of(seed: int, block: int) -> int:
    """A seed for one block's order."""
    return (seed * 1_000_003 + block) & ((1 << 63) - 1)
