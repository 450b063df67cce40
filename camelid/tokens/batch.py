"""Batches of packed documents for the one training loop.

A row holds pieces of documents that cannot see each other; what is left of it is padding, which is never learned.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from camelid.artifact import read_manifest
from camelid.errors import InputError
from camelid.tokens.order import item_at
from camelid.tokens.pack import pack
from camelid.tokens.write import INDEX, STARTS, TOKENS

IGNORE = -100
PADDING = -1  # the document id of what is no document
HELD_OUT_TOKENS = 65_536  # of a folder, at most: enough to tell two losses apart, measured in seconds


@dataclass(frozen=True)
class Batch:
    """input_ids, labels (already shifted; IGNORE where nothing is learned) and document_ids: int64 [rows, seq].

    `one_document` is True when no row holds two documents, so plain causal attention is right. `facts`
    [rows, documents, facts] is what an objective knows of each document of a row besides its tokens, if anything.
    Where ids and labels are a stretch of longer rows, it `begins` there, and document_ids are of the whole rows.
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor
    one_document: bool
    facts: Tensor | None = None
    begins: int = 0

    def supervised(self) -> int:
        """How many positions have a label: the divisor of the loss."""
        return int((self.labels != IGNORE).sum())

    def part(self, first: int, last: int) -> Batch:
        """The rows from `first` up to `last`."""
        part = slice(first, last)
        facts = None if self.facts is None else self.facts[part]
        ids, labels, documents = (t[part] for t in (self.input_ids, self.labels, self.document_ids))
        return replace(self, input_ids=ids, labels=labels, document_ids=documents, facts=facts)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        ids, labels, documents = (t.to(device) for t in (self.input_ids, self.labels, self.document_ids))
        facts = None if self.facts is None else self.facts.to(device)
        return replace(self, input_ids=ids, labels=labels, document_ids=documents, facts=facts)

    def fingerprints(self) -> Tensor:
        """A 63-bit hash of each row's ids and labels, int64 [rows]: what a run's chain of trained rows is made of."""
        found = []
        for ids, labels in zip(self.input_ids.cpu().numpy(), self.labels.cpu().numpy(), strict=True):
            digest = hashlib.blake2b(ids.tobytes() + labels.tobytes(), digest_size=8).digest()
            found.append(int.from_bytes(digest, "little") >> 1)
        return torch.tensor(found)


class Source(Protocol):
    """What the training loop asks of data. Position counts sequences over the whole run."""

    def __len__(self) -> int:
        """Sequences in one epoch."""
        ...

    def batch(self, position: int, rows: int) -> Batch: ...


class PackedTokens:
    """Rows over a tokens folder, in the order of `tokens/order.py`, but for a share of them, `held` out, drawn by
    the seed and at most HELD_OUT_TOKENS. Of a document longer than a row some pieces may be held and others not, and
    of one that the folder repeats one copy. Raises InputError when it is no tokens folder or nothing is left of it."""

    def __init__(self, folder: str | Path, sequence_length: int, seed: int, held_out: float = 0.0) -> None:
        self.folder, self.sequence_length, self.seed = Path(folder), sequence_length, seed
        if read_manifest(self.folder)["kind"] != "tokens":
            raise InputError(f"data.tokens: {folder} is not a tokens folder: make one with `camelid tokens build`")
        self.index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        self.data = np.memmap(self.folder / TOKENS, dtype=self.index["dtype"], mode="r")
        self.packing = pack(np.load(self.folder / STARTS), sequence_length)
        if self.packing.sizes.sum() < sequence_length:
            raise InputError(
                f"{folder} holds {len(self.data)} tokens, not one row of {sequence_length}: "
                "lower train.sequence_length or add text"
            )
        count = len(self.packing)
        held = max(1, min(round(held_out * count), HELD_OUT_TOKENS // sequence_length)) if held_out else 0
        if held >= count:
            raise InputError(
                f"data.held_out {held_out:g} of the {count} rows of {sequence_length} tokens in {folder} leaves none "
                "to learn from: set it to 0, lower train.sequence_length, or add text"
            )
        self.held = [item_at(n, count, seed) for n in range(held)]
        self._learned = np.setdiff1d(np.arange(count), self.held) if held else None

    def __len__(self) -> int:
        return len(self.packing) - len(self.held)

    @property
    def fill(self) -> float:
        """The share of positions that predict something."""
        return float(self.packing.sizes.sum()) / (len(self.packing) * self.sequence_length)

    def batch(self, position: int, rows: int) -> Batch:
        """The `rows` sequences from `position` on."""
        items = [item_at(p, len(self), self.seed) for p in range(position, position + rows)]
        return self.rows(items if self._learned is None else self._learned[items].tolist())

    def rows(self, items: list[int]) -> Batch:
        """The rows with these numbers, held out or not."""
        shape = (len(items), self.sequence_length)
        ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        documents = np.full(shape, PADDING, np.int64)
        pieces = self.packing
        for row, item in enumerate(items):
            at, first = 0, int(pieces.rows[item])
            for piece in range(first, int(pieces.rows[item + 1])):
                begin, size = int(pieces.firsts[piece]), int(pieces.sizes[piece])
                tokens = self.data[begin : begin + size + 1]
                ids[row, at : at + size] = tokens[:-1]
                labels[row, at : at + size] = tokens[1:]
                documents[row, at : at + size] = piece - first
                at += size
        tensors = torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(documents)
        return Batch(*tensors, one_document=bool((documents <= 0).all()))
