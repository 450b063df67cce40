"""The order of training data: a pure function of (seed, position), so a loader's whole state is one integer.

Each epoch visits every item once, in the order of a keyed permutation (a four-round Feistel network, walked until
it lands inside the range). Nothing is stored or shuffled; any rank, worker or resumed run computes its own share.
"""

from __future__ import annotations

import hashlib

ROUNDS = 4


def item_at(position: int, count: int, seed: int) -> int:
    """Which of `count` items stands at `position` (0, 1, 2, … over all epochs). Raises ValueError for no items."""
    if count < 1 or position < 0:
        raise ValueError(f"position {position} of {count} items does not exist")
    epoch, index = divmod(position, count)
    half = max(1, (count - 1).bit_length() + 1 >> 1)
    while True:  # the domain is less than 4 times the range, so this walks a few steps
        index = _permute(index, half, f"{seed}:{epoch}")
        if index < count:
            return index


def _permute(value: int, half: int, key: str) -> int:
    left, right = value >> half, value & ((1 << half) - 1)
    for round_number in range(ROUNDS):
        mixed = hashlib.blake2b(f"{key}:{round_number}:{right}".encode(), digest_size=8).digest()
        left, right = right, left ^ (int.from_bytes(mixed, "little") & ((1 << half) - 1))
    return left << half | right
