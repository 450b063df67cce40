"""BLEU, chrF and TER by sacrebleu, with its signature and a bootstrap interval."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from camelid.errors import InputError, MissingExtra

BOOTSTRAP = 1000


def check_lengths(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise InputError unless every reference has one line per hypothesis."""
    if not hypotheses or not references:
        raise InputError("there is nothing to score: the hypotheses or the references are empty")
    for number, reference in enumerate(references, 1):
        if len(reference) != len(hypotheses):
            raise InputError(
                f"{len(hypotheses)} hypotheses but reference {number} has {len(reference)} lines: line up the files"
            )


def _unspaced(references: Sequence[Sequence[str]]) -> bool:
    """Whether they are Chinese or Japanese: hardly a blank parts their words."""
    text = "".join(references[0])
    found = re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]", text)
    return len(found) > 0.3 * len(text)


def _doubt(references: Sequence[Sequence[str]], tokenize: str) -> str | None:
    """What may be wrong with references: empty ones, or a script that the tokenizer does not cut."""
    empty = sum(not any(r[n].strip() for r in references) for n in range(len(references[0])))
    if empty:
        return f"{empty} of {len(references[0])} segments have no reference text"
    if tokenize in ("13a", "intl", "none") and _unspaced(references):
        return f"the references are Chinese or Japanese, which {tokenize} does not cut: --tokenize zh or ja-mecab"
    return None


def bleu(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenize: str = "13a",
    bootstrap: int = BOOTSTRAP,
    ter: bool = True,
) -> dict[str, Any]:
    """Corpus scores. `references` is a list of reference sets, each as long as the hypotheses.

    Returns bleu, chrf and (unless ter=False, it is slow) ter as {score, signature, interval}; interval is the
    half-width of the 95 % bootstrap interval (Koehn 2004), None when bootstrap is 0. TER of Chinese and Japanese counts
    characters, which its signature tells. `warning` tells of references that are empty, or in a script that the
    tokenizer does not cut.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
        from sacrebleu.metrics.ter import TER
    except ImportError:
        raise MissingExtra("sacrebleu", "evaluate", "BLEU") from None
    check_lengths(hypotheses, references)
    if tokenize not in BLEU.TOKENIZERS:
        raise InputError(f"sacrebleu has no tokenizer {tokenize!r}; it has {', '.join(map(str, BLEU.TOKENIZERS))}")
    try:
        metrics: dict[str, Any] = {"bleu": BLEU(tokenize=tokenize), "chrf": CHRF()}
    except (RuntimeError, ImportError) as error:  # some tokenizers need a package, which its message names
        raise InputError(f"sacrebleu's tokenizer {tokenize}: {' '.join(str(error).split())}") from None
    if ter:
        unspaced = _unspaced(references)  # else a whole line would be one word
        metrics["ter"] = TER(normalized=unspaced, asian_support=unspaced)
    if bootstrap == 1:
        raise InputError("--bootstrap 1: an interval needs more samples than one (1000 are usual), or 0 for none")
    sets = [list(r) for r in references]
    results: dict[str, Any] = {}
    for name, metric in metrics.items():
        score = metric.corpus_score(list(hypotheses), sets, n_bootstrap=bootstrap if bootstrap else 1)
        results[name] = {
            "score": score.score,
            "signature": str(metric.get_signature()),
            "interval": float(score._ci) if bootstrap else None,
        }
    if doubt := _doubt(sets, tokenize):
        results["warning"] = doubt
    results["bleu"]["tokenize"] = tokenize
    signature = results["bleu"]["signature"]
    return results | {
        "protocol": (
            f"sacrebleu corpus scores over {len(hypotheses)} segments, {len(sets)} reference(s), BLEU {signature}"
        ),
    }
