"""ROUGE-1, -2, -L and -Lsum by rouge-score (a port of the original script), with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from camelid.errors import MissingExtra
from camelid.evaluate.bleu import check_lengths

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    stemmer: bool = True,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Means over all pairs; with several references the best by F counts.

    Returns each kind as {precision, recall, fmeasure, interval}; interval is the half-width of the 95 % bootstrap
    interval of the mean F. rougeLsum expects one sentence a line.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MissingExtra("rouge-score", "evaluate", "ROUGE") from None
    check_lengths(hypotheses, references)
    scorer = RougeScorer(list(KINDS), use_stemmer=stemmer)
    pairs = [
        scorer.score_multi([r[i] for r in references], hypothesis) if len(references) > 1
        else scorer.score(references[0][i], hypothesis)
        for i, hypothesis in enumerate(hypotheses)
    ]  # fmt: skip
    draws = np.random.default_rng(seed).integers(0, len(pairs), (bootstrap, len(pairs))) if bootstrap else None
    results: dict[str, Any] = {}
    for kind in KINDS:
        scores = np.array([[p[kind].precision, p[kind].recall, p[kind].fmeasure] for p in pairs])
        precision, recall, f = scores.mean(axis=0).tolist()
        interval = None
        if draws is not None:
            low, high = np.percentile(scores[:, 2][draws].mean(axis=1), [2.5, 97.5])
            interval = float(high - low) / 2
        results[kind] = {"precision": precision, "recall": recall, "fmeasure": f, "interval": interval}
    stem = "Porter stemmer" if stemmer else "no stemmer"
    return results | {"protocol": f"rouge-score, {stem}, mean of {len(pairs)} pairs, {len(references)} reference(s)"}
