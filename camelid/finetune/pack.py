"""Examples into rows of equal length for the training loop: packed by best fit, never attending to each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from camelid.errors import InputError
from camelid.finetune.conversation import Example
from camelid.tokens.batch import IGNORE, PADDING, Batch
from camelid.tokens.order import item_at
from camelid.tokens.pack import best_fit

Unit = tuple[Example, ...]
"""Examples that must stand in one row: one conversation, or the two answers of a preference."""


class PackedExamples:
    """Units packed into rows of `sequence_length`. One that does not fit is left out and counted, never cut.

    `kept` are the numbers of the units that fit, `facts` [kept units, examples of a unit, facts] goes with them into
    the batches. Raises InputError when no unit fits.
    """

    facts: Tensor | None = None

    def __init__(self, units: Sequence[Unit], sequence_length: int, seed: int, pad: int) -> None:
        self.sequence_length, self.seed, self.pad = sequence_length, seed, pad
        sizes = [sum(len(e.ids) - 1 for e in unit) for unit in units]
        fitting = [n for n, size in enumerate(sizes) if size <= sequence_length]
        self.left_out = len(units) - len(fitting)
        self.longest = max(sizes, default=0)
        if not fitting:
            raise InputError(
                f"no example fits into train.sequence_length {sequence_length}: the longest needs {self.longest}"
            )
        self.kept = fitting
        self.units = [units[n] for n in fitting]
        # Best fit looks at sizes only; drawn in a random order first, equal ones meet different neighbours.
        order = [item_at(n, len(fitting), seed) for n in range(len(fitting))]
        row = best_fit(np.array([sizes[fitting[n]] for n in order], dtype=np.int64), sequence_length)
        self.rows: list[list[int]] = [[] for _ in range(int(row.max()) + 1)]
        for n, r in zip(order, row.tolist(), strict=True):
            self.rows[r].append(n)

    def __len__(self) -> int:
        return len(self.rows)

    def counted(self) -> dict[str, int]:
        """How many units there are, how many did not fit, and in how many rows."""
        return {"examples": len(self.units), "left_out_too_long": self.left_out, "rows": len(self)}

    def batch(self, position: int, rows: int) -> Batch:
        """The `rows` packed sequences from `position` on, in the order of `tokens/order.py`."""
        return self.batch_of([item_at(position + r, len(self.rows), self.seed) for r in range(rows)])

    def batch_of(self, rows: Sequence[int]) -> Batch:
        """The packed sequences of these numbers."""
        shape = (len(rows), self.sequence_length)
        ids, labels = torch.full(shape, self.pad), torch.full(shape, IGNORE)
        documents = torch.full(shape, PADDING)
        for r, row in enumerate(rows):
            at = number = 0
            for example in (e for n in self.rows[row] for e in self.units[n]):
                end = at + len(example.ids) - 1
                ids[r, at:end] = torch.tensor(example.ids[:-1])
                labels[r, at:end] = torch.tensor(example.labels[1:])
                documents[r, at:end] = number
                at, number = end, number + 1
        return Batch(ids, labels, documents, one_document=False, facts=self._facts(rows))

    def _facts(self, rows: Sequence[int]) -> Tensor | None:
        if self.facts is None:
            return None
        each = self.facts.shape[1]
        widest = each * max(len(self.rows[row]) for row in rows)
        facts = torch.zeros((len(rows), widest, self.facts.shape[2]), dtype=self.facts.dtype)
        for r, row in enumerate(rows):
            chosen = self.facts[self.rows[row]].flatten(0, 1)
            facts[r, : len(chosen)] = chosen
        return facts
