"""How often each source counts: epochs, or weights as shares of the mixture (LLaMA paper, table 1).

A document of a source with 2.45 epochs is read twice, and by a hash of its text in 45 of 100 cases once more: the
choice is the same in every run and needs no state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from camelid.errors import InputError
from camelid.recipe import SourceSection


def check(sources: Sequence[SourceSection]) -> None:
    """Raise InputError when names repeat, or weights and epochs are mixed."""
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise InputError(f"corpus.sources: two sources share a name ({', '.join(names)})")
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and (not all(weighted) or any(source.epochs is not None for source in sources)):
        raise InputError("corpus.sources: give every source a weight, or none (then each may have epochs)")


def table(kept: Mapping[str, Mapping[str, int]], sources: Sequence[SourceSection]) -> dict[str, dict[str, Any]]:
    """For every source: documents and bytes kept, epochs, and the share of the mixture in bytes.

    With weights the mixture is as large as the kept text, and a source's epochs follow from its share.
    """
    total = sum(k["bytes"] for k in kept.values())
    weights = {s.name: s.weight for s in sources if s.weight is not None}
    epochs: dict[str, float] = dict.fromkeys(kept, 1.0) | {s.name: s.epochs for s in sources if s.epochs}
    if weights:
        whole = sum(weights.values())
        epochs = {n: weights[n] / whole * total / kept[n]["bytes"] if kept[n]["bytes"] else 0.0 for n in kept}
    size = sum(epochs[n] * kept[n]["bytes"] for n in kept)
    return {
        name: {
            **k,
            "epochs": round(epochs[name], 6),
            "share": round(epochs[name] * k["bytes"] / size, 6) if size else 0.0,
        }
        for name, k in kept.items()
    }


def repeated(rows: Iterable[tuple[str, str]], epochs: Mapping[str, float]) -> Iterator[str]:
    """The text of every (text, origin) row, as often as its origin's epochs say."""
    for text, origin in rows:
        times = epochs.get(origin, 1.0)
        whole = int(times)
        if (part := times - whole) > 0:
            draw = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") / 2**32
            whole += draw < part
        for _ in range(whole):
            yield text
