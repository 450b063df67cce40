"""Records to clean documents, a batch at a time: extract, repair, identify, filter, mask. Nothing here looks at two
documents together; that is `dedup`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from camelid.corpus import c4, extract, filters, language, pii, wiki
from camelid.corpus.account import Account
from camelid.corpus.decontaminate import EvaluationSets
from camelid.corpus.document import Document
from camelid.corpus.read import find_files, read
from camelid.corpus.repair import polish
from camelid.corpus.statistics import measure
from camelid.recipe import CorpusSection

BATCH_BYTES, BATCH_DOCUMENTS = 4 * 2**20, 1000


@dataclass(frozen=True)
class Clean:
    """A document that passed every rule, and the record it came from."""

    record: Document
    text: str
    language: str


@dataclass(frozen=True)
class Cleaner:
    """The settings of one corpus, with what they need loaded. `perplexity` scores texts for the optional filter."""

    settings: CorpusSection
    sets: EvaluationSets
    perplexity: Callable[[Sequence[str]], Sequence[float]] | None = None
    max_perplexity: float = float("inf")

    def run(self, records: Iterable[Document], account: Account) -> Iterator[list[Clean]]:
        """Clean documents by the batch; every record is entered into `account`."""
        for batch in batches(records):
            yield self._filter([c for record in batch if (c := self._text(record, account))], account)

    def _text(self, record: Document, account: Account) -> Clean | None:
        """The record's text and language; None (and an entry) when there is none or another is wanted."""
        if record.fault or record.skip:
            account.add(record, "quarantined" if record.fault else "dropped", record.fault or record.skip or "")
            return None
        text = polish(plain_text(record, self.settings.extractor), record.kind, record.source)
        if not text.strip():
            account.add(record, "dropped", "no_main_text" if record.kind == "html" else "empty")
            return None
        spoken = language.UNKNOWN if record.kind == "code" else language.identify(text)
        if self.settings.languages and spoken not in self.settings.languages:
            account.add(record, "dropped", "language", text)
            return None
        return Clean(record, text, spoken)

    def _filter(self, found: list[Clean], account: Account) -> list[Clean]:
        reasons = self._reasons(found)
        kept = []
        for item, (text, reason) in zip(found, reasons, strict=True):
            if reason:
                account.add(item.record, "dropped", reason, item.text)
                continue
            masked: Counter[str] = Counter()
            if self.settings.mask_pii:
                text = pii.mask(text, masked)
            account.pii += masked
            account.add(item.record, "kept", text=text)
            kept.append(replace(item, text=text))
        return kept

    def _reasons(self, found: list[Clean]) -> list[tuple[str, str | None]]:
        """(text, why it is dropped or None) of every document."""
        settings = self.settings
        limits = {"too_short": float(settings.min_characters)} | settings.limits
        groups = [filters.groups_for(item.record.kind, settings.filters) for item in found]
        texts = [item.text for item in found]
        reasons: list[str | None] = [None] * len(found)
        if any("c4" in g for g in groups):
            for i, (text, reason) in enumerate(c4.clean(texts)):
                if "c4" in groups[i]:
                    texts[i], reasons[i] = text, reason or None
        scores = self.perplexity(texts) if self.perplexity else [0.0] * len(texts)
        contaminated = self.sets.contaminated(texts)
        for i, figures in enumerate(measure(texts)):
            reasons[i] = (
                reasons[i]
                or filters.reason_to_drop(figures, found[i].language, groups[i], limits)
                or ("perplexity" if scores[i] > self.max_perplexity else None)
                or (f"contaminated:{contaminated[i]}" if contaminated[i] else None)
            )
        return list(zip(texts, reasons, strict=True))


def plain_text(record: Document, extractor: extract.Extractor = "trafilatura") -> str:
    """A record's text without its markup, not yet repaired."""
    if record.kind == "html":
        return extract.main_text(record.text, extractor)
    return wiki.plain(record.text) if record.kind == "wiki" else record.text


def texts_of(inputs: Sequence[str | Path]) -> Iterator[str]:
    """The texts of files, folders and globs, without markup; what cannot be read is passed over."""
    for record in (record for path in find_files(inputs) for record in read(path)):
        if not (record.fault or record.skip) and (text := plain_text(record)):
            yield text


def batches(records: Iterable[Document]) -> Iterator[list[Document]]:
    """Records in groups of bounded size, so that memory does not grow with the input."""
    group: list[Document] = []
    size = 0
    for record in records:
        group.append(record)
        size += record.size
        if size >= BATCH_BYTES or len(group) >= BATCH_DOCUMENTS:
            yield group
            group, size = [], 0
    if group:
        yield group
