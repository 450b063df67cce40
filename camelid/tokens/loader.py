"""This rank's share of every global batch, made ahead by threads.

The state is the position, one integer: the share of a rank is a slice of the global batch, so any number of ranks and
threads together read the same sequences in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor

from camelid.tokens.batch import Batch, Source


def batches(
    source: Source, position: int, rows: int, *, rank: int = 0, world: int = 1, workers: int = 0
) -> Generator[tuple[int, Batch], None, None]:
    """(position after it, this rank's part) of every global batch of `rows` sequences from `position` on, without end.

    Raises ValueError when the ranks cannot share a batch evenly.
    """
    if rows % world:
        raise ValueError(f"{rows} sequences cannot be shared evenly by {world} ranks")
    own = rows // world

    def part(number: int) -> tuple[int, Batch]:
        start = position + number * rows
        return start + rows, source.batch(start + rank * own, own)

    if not workers:
        number = 0
        while True:
            yield part(number)
            number += 1
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[tuple[int, Batch]]] = deque()
        number = 0
        try:
            while True:
                while len(waiting) < 2 * workers:
                    waiting.append(pool.submit(part, number))
                    number += 1
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
