"""What became of the input, to look at: `report.html`, and a data card in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camelid.corpus.account import Account
from camelid.corpus.minhash import BANDS, ROWS, expected_recall
from camelid.disk import write_atomic
from camelid.recipe import CorpusSection
from camelid.report.page import Page

Groups = NDArray[np.int64]


def write_report(
    folder: Path, name: str, account: Account, facts: Mapping[str, Any], settings: CorpusSection, near: Groups
) -> None:
    """report.html and README.md (the data card) in `folder`."""
    page = Page(f"Corpus {name}")
    page.text(conservation(facts["documents"], "documents"))
    page.text(conservation(facts["bytes"], "bytes"))
    page.text(f"The kept documents hold {account.text_bytes:,} bytes of clean text.")
    page.flow("From input to corpus, bytes", facts["bytes"]["read"], _outflows(facts["bytes"]))
    page.heading("What was left out, and why")
    page.table(["reason", "documents", "bytes"], _reasons(facts))
    _side_by_side(page, account)
    if len(facts["mixture"]) > 1:
        page.heading("Sources")
        rows = [(n, r["documents"], r["bytes"], r["epochs"], 100 * r["share"]) for n, r in facts["mixture"].items()]
        page.table(["source", "documents", "bytes kept", "epochs", "% of mixture"], rows)
    page.bars("Languages, documents", list(account.languages.most_common(20)))
    page.bars("Lengths, documents by characters", _lengths(account))
    _duplicates(page, settings, near)
    if settings.mask_pii:
        page.heading("Personal data masked, in copies that were left out later too")
        page.table(["kind", "times"], list(account.pii.most_common()) or [("none found", 0)])
    page.write(folder / "report.html")
    write_atomic(folder / "README.md", card(name, account, facts, settings))


def conservation(tally: Mapping[str, Any], unit: str) -> str:
    """The books in one line."""
    dropped, quarantined = sum(tally["dropped"].values()), sum(tally["quarantined"].values())
    return f"{tally['read']:,} {unit} read = {tally['kept']:,} kept + {dropped:,} dropped + {quarantined:,} quarantined"


def _outflows(tally: Mapping[str, Any]) -> list[tuple[str, int]]:
    out = [("kept", tally["kept"]), *tally["dropped"].items()]
    return [*out, *((f"{reason} (quarantined)", n) for reason, n in tally["quarantined"].items())]


def _reasons(facts: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    documents, size = facts["documents"], facts["bytes"]
    rows = [(reason, n, size["dropped"][reason]) for reason, n in documents["dropped"].items()]
    rows += [(f"{r} (quarantined)", n, size["quarantined"][r]) for r, n in documents["quarantined"].items()]
    return rows or [("nothing", 0, 0)]


def _side_by_side(page: Page, account: Account) -> None:
    """For every reason dropped documents beside kept ones, so that a person can judge the rule."""
    kept = account.examples.get("kept", [])
    reasons = [r for r in account.documents.dropped if account.examples.get(r)]
    if not reasons:
        return
    page.heading("Dropped beside kept")
    rows: list[Sequence[object]] = []
    for number, reason in enumerate(reasons):
        for example in account.examples[reason][:2]:
            other = kept[(number + len(rows)) % len(kept)] if kept else {"source": "", "text": ""}
            rows.append((reason, _shown(example), _shown(other)))
    page.table(["reason", "dropped", "kept"], rows)


def _shown(example: Mapping[str, str]) -> str:
    return f"{Path(example['source']).name}: {' '.join(example['text'].split())[:240]}"


def _lengths(account: Account) -> list[tuple[str, int]]:
    return [
        (f"up to {(1 << int(bits)) - 1:,}", n) for bits, n in sorted(account.lengths.items(), key=lambda x: int(x[0]))
    ]


def _duplicates(page: Page, settings: CorpusSection, near: Groups) -> None:
    if settings.deduplicate != "near":
        return
    page.heading("Near duplicates")
    sizes = np.unique(near[:, 1], return_counts=True)[1] + 1 if len(near) else np.empty(0, np.int64)
    recall = ", ".join(f"{expected_recall(s):.4g} at {s}" for s in (0.7, 0.8, 0.9))
    page.text(
        f"{len(sizes):,} clusters, {len(near):,} documents beyond the first of each. Shingles of 5 words, MinHash with "
        f"{BANDS} bands of {ROWS} rows, candidates compared exactly, Jaccard similarity of at least "
        f"{settings.near_threshold}; expected recall {recall}."
    )
    if len(sizes):
        values, counts = np.unique(sizes, return_counts=True)
        page.bars(
            "Clusters by size", [(f"{v} documents", int(c)) for v, c in zip(values[:15], counts[:15], strict=True)]
        )


def _set(checked: Mapping[str, Any]) -> str:
    short = f" (but for {checked['too_short']:,} of its {checked['texts']:,} texts, of fewer than 13 words)"
    return f"{checked['name']}{short if checked['too_short'] else ''}"


def card(name: str, account: Account, facts: Mapping[str, Any], settings: CorpusSection) -> str:
    """The data card."""
    languages = ", ".join(f"{code} {n:,}" for code, n in account.languages.most_common(10))
    reasons = "\n".join(f"| {reason} | {n:,} | {size:,} |" for reason, n, size in _reasons(facts))
    sources = "\n".join(
        f"| {n} | {r['documents']:,} | {r['bytes']:,} | {r['epochs']:g} | {r['share']:.1%} |"
        for n, r in facts["mixture"].items()
    )
    checked = ", ".join(map(_set, facts["decontaminated"])) or "none: scores on public test sets may be inflated"
    masked = ", ".join(f"{kind} {n:,}" for kind, n in account.pii.most_common()) or "nothing found"
    return f"""# {name}

{conservation(facts["documents"], "documents")}.
{conservation(facts["bytes"], "bytes")}; {account.text_bytes:,} bytes of clean text.

- Languages (documents): {languages or "none"}
- Evaluation sets kept out: {checked}
- Personal data masked, in copies that were left out later too: {masked if settings.mask_pii else "off"}
- Near-duplicate clusters: {facts["near_duplicate_clusters"]:,}

| source | documents | bytes | epochs | share |
|---|---|---|---|---|
{sources}

| left out | documents | bytes |
|---|---|---|
{reasons}

`camelid.json` has the settings, the inputs with their SHA-256, and the digest of the text.
"""
