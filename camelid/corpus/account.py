"""The books of a corpus: read = kept + dropped by reason + quarantined by reason, in documents and in bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from camelid.corpus.document import Document, Outcome
from camelid.errors import CamelidError

EXAMPLES, EXAMPLE_CHARACTERS = 4, 400


@dataclass
class Tally:
    """Amounts of one unit: documents, or bytes."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)

    def balanced(self) -> bool:
        return self.read == self.kept + self.dropped.total() + self.quarantined.total()

    def to_dict(self) -> dict[str, Any]:
        """Reasons by size, largest first."""
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "quarantined": dict(self.quarantined.most_common()),
        }


@dataclass
class Account:
    """What became of every record, with examples of each outcome and what the kept text is like."""

    documents: Tally = field(default_factory=Tally)
    bytes: Tally = field(default_factory=Tally)
    text_bytes: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    lengths: Counter[str] = field(default_factory=Counter)  # documents by the power of two their characters reach
    pii: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def add(self, document: Document, outcome: Outcome, reason: str = "", text: str = "") -> None:
        """Enter one record. `text` is what an example of it shows."""
        self.documents.read += 1
        self.bytes.read += document.size
        self._enter(outcome, reason, document.size)
        self._example(reason or outcome, document.source, text or document.text)

    def _enter(self, outcome: Outcome, reason: str, size: int) -> None:
        for tally, amount in ((self.documents, 1), (self.bytes, size)):
            if outcome == "kept":
                tally.kept += amount
            else:
                getattr(tally, outcome)[reason] += amount

    def _example(self, key: str, source: str, text: str) -> None:
        shown = self.examples.setdefault(key, [])
        if len(shown) < EXAMPLES and text.strip():
            shown.append({"source": source, "text": text[:EXAMPLE_CHARACTERS]})

    def keep(self, text: str, language: str) -> None:
        """Describe a kept document."""
        self.text_bytes += len(text.encode())
        self.languages[language] += 1
        self.lengths[str(len(text).bit_length())] += 1

    def drop_kept(self, source: str, size: int, reason: str, text: str) -> None:
        """A document counted as kept is dropped after all (a duplicate)."""
        for tally, amount in ((self.documents, 1), (self.bytes, size)):
            tally.kept -= amount
            tally.dropped[reason] += amount
        self._example(reason, source, text)

    def check(self) -> None:
        """Raise CamelidError when the books do not balance: a fault of ours, never to be passed over."""
        for name in ("documents", "bytes"):
            if not getattr(self, name).balanced():
                raise CamelidError(f"the {name} of the corpus do not add up: {getattr(self, name).to_dict()}")

    def to_dict(self) -> dict[str, Any]:
        return {
            "documents": self.documents.to_dict(),
            "bytes": self.bytes.to_dict(),
            "text_bytes": self.text_bytes,
            "languages": dict(self.languages.most_common()),
            "lengths": dict(sorted(self.lengths.items(), key=lambda item: int(item[0]))),
            "pii": dict(self.pii.most_common()),
            "examples": self.examples,
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Account:
        def tally(part: dict[str, Any]) -> Tally:
            return Tally(part["read"], part["kept"], Counter(part["dropped"]), Counter(part["quarantined"]))

        counters = {name: Counter(raw[name]) for name in ("languages", "lengths", "pii")}
        return cls(
            tally(raw["documents"]), tally(raw["bytes"]), raw["text_bytes"], examples=raw["examples"], **counters
        )


def total(accounts: Iterable[Account]) -> Account:
    """All accounts in one; examples are the first met."""
    result = Account()
    for account in accounts:
        for mine, theirs in ((result.documents, account.documents), (result.bytes, account.bytes)):
            mine.read += theirs.read
            mine.kept += theirs.kept
            mine.dropped.update(theirs.dropped)  # unlike +=, keeps a reason of 0 bytes
            mine.quarantined.update(theirs.quarantined)
        result.text_bytes += account.text_bytes
        result.languages += account.languages
        result.lengths += account.lengths
        result.pii += account.pii
        for key, shown in account.examples.items():
            mine_shown = result.examples.setdefault(key, [])
            mine_shown += shown[: EXAMPLES - len(mine_shown)]
    return result
