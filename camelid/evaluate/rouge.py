"""ROUGE-1, -2, -L and -Lsum (Lin 2004) with bootstrap intervals: the figures of rouge-score, for Chinese too.

Arithmetic and tie-breaking follow rouge-score 0.1.2 (google-research), which follows the original script 1.5.5; a test
holds them equal to 1e-12. rougeLsum takes one sentence a line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camelid.errors import InputError, MissingExtra
from camelid.evaluate.bleu import check_lengths

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
TOKENIZERS = ("words", "zh", "zh-words")
Tokens = list[str]
Cut = Callable[[str], Tokens]
Score = tuple[float, float, float]
"""precision, recall, F."""


def cutter(tokenize: str, stemmer: bool) -> Cut:
    """How texts are cut: "words" of a-z and 0-9 in lower case (rouge-score's), "zh" (each Chinese character, and words
    as before), "zh-words" (by jieba). Raises InputError for another name."""
    if tokenize == "words":
        return _words(stemmer)
    if tokenize == "zh":
        return lambda text: re.findall(r"[a-z0-9]+|[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]", text.lower())
    if tokenize == "zh-words":
        return _chinese_words()
    raise InputError(f"no ROUGE tokenizer named {tokenize!r}; choose one of {', '.join(TOKENIZERS)}")


def _words(stemmer: bool) -> Cut:
    if not stemmer:
        return lambda text: re.findall(r"[a-z0-9]+", text.lower())
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError:
        raise MissingExtra("nltk", "evaluate", "ROUGE's stemmer") from None
    stem = PorterStemmer().stem
    known: dict[str, str] = {}

    def cut(text: str) -> Tokens:
        found = []
        for word in re.findall(r"[a-z0-9]+", text.lower()):
            if word not in known:
                known[word] = stem(word) if len(word) > 3 else word
            if re.fullmatch(r"[a-z0-9]+", known[word]):
                found.append(known[word])
        return found

    return cut


def _chinese_words() -> Cut:
    try:
        import jieba
    except ImportError:
        raise MissingExtra("jieba", "chinese", "ROUGE over Chinese words") from None
    jieba.setLogLevel(60)
    return lambda text: [word for word in jieba.lcut(text.lower()) if re.search(r"\w", word)]


def rouge(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    stemmer: bool = True,
    tokenize: str = "words",
    bootstrap: int = 1000,
    seed: int = 0,
    items: bool = False,
) -> dict[str, Any]:
    """Means over all pairs; with several references the best by F counts.

    Returns each kind as {precision, recall, fmeasure, interval}; interval is the half-width of the 95 % bootstrap
    interval of the mean F. With `items` also every pair with its F. `warning` tells of references that the tokenizer
    makes nothing of.
    """
    check_lengths(hypotheses, references)
    if bootstrap == 1:
        raise InputError("--bootstrap 1: an interval needs more samples than one (1000 are usual), or 0 for none")
    cut = cutter(tokenize, stemmer)
    each = [best_scores(h, [r[i] for r in references], cut) for i, h in enumerate(hypotheses)]
    draws = np.random.default_rng(seed).integers(0, len(each), (bootstrap, len(each))) if bootstrap else None
    results: dict[str, Any] = {}
    for kind in KINDS:
        scores = np.array([pair[kind] for pair in each], dtype=np.float64)
        precision, recall, f = scores.mean(axis=0).tolist()
        interval = None
        if draws is not None:
            low, high = np.percentile(scores[:, 2][draws].mean(axis=1), [2.5, 97.5])
            interval = float(high - low) / 2
        results[kind] = {"precision": precision, "recall": recall, "fmeasure": f, "interval": interval}
    how = {"words": "Porter stemmer" if stemmer else "no stemmer"}.get(tokenize, f"tokenizer {tokenize}")
    if items:
        results["items"] = [
            {kind: pair[kind][2] for kind in KINDS} | {"hypothesis": h, "reference": r}
            for pair, h, r in zip(each, hypotheses, references[0], strict=True)
        ]
    results["protocol"] = (
        f"ROUGE as rouge-score 0.1.2, {how}, mean of {len(each)} pairs, {len(references)} reference(s), "
        "a sentence a line"
    )
    if empty := sum(bool(text.strip()) and not cut(text) for r in references for text in r):
        results["warning"] = f"{empty} references hold no token under the tokenizer {tokenize}: try tokenize zh"
    return results


def best_scores(hypothesis: str, references: Sequence[str], cut: Cut) -> dict[str, Score]:
    """Every kind's scores of one text, against the reference that gives the highest F."""
    every = [pair_scores(hypothesis, reference, cut) for reference in references]
    return {kind: max((scores[kind] for scores in every), key=lambda s: s[2]) for kind in KINDS}


def pair_scores(hypothesis: str, reference: str, cut: Cut) -> dict[str, Score]:
    """Every kind's scores of a text against one reference."""
    said, wanted = cut(hypothesis), cut(reference)
    lines = [[cut(line) for line in text.split("\n") if line] for text in (hypothesis, reference)]
    return {
        "rouge1": _overlap(said, wanted, 1),
        "rouge2": _overlap(said, wanted, 2),
        "rougeL": _score(lcs_length(wanted, said), len(said), len(wanted)),
        "rougeLsum": _summary(*lines),
    }


def _score(hits: int, said: int, wanted: int) -> Score:
    precision, recall = hits / max(said, 1), hits / max(wanted, 1)
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _overlap(said: Tokens, wanted: Tokens, n: int) -> Score:
    a, b = (Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for tokens in (said, wanted))
    return _score((a & b).total(), a.total(), b.total())


def lcs_length(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence, by bits (Hyyrö 2004): a whole row of the table at a time."""
    places: dict[str, int] = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    row = full = (1 << len(a)) - 1
    for token in b:
        both = row & places.get(token, 0)
        row = (row + both | row - both) & full
    return len(a) - row.bit_count()


def _summary(said: list[Tokens], wanted: list[Tokens]) -> Score:
    """Section 3.2: per sentence of the reference, the union of its subsequences with every sentence said; a token
    counts no more often than it stands in either text."""
    left_said, left_wanted = (Counter(t for sentence in text for t in sentence) for text in (said, wanted))
    total_said, total_wanted = left_said.total(), left_wanted.total()
    hits = 0
    for sentence in wanted:
        union = sorted({i for other in said for i in _lcs_places(sentence, other)})
        for token in (sentence[i] for i in union):
            if left_said[token] > 0 and left_wanted[token] > 0:
                hits += 1
                left_said[token] -= 1
                left_wanted[token] -= 1
    return _score(hits, total_said, total_wanted)


def _lcs_places(a: Tokens, b: Tokens) -> list[int]:
    """Where in `a` a longest common subsequence with `b` stands: of several, rouge-score's."""
    if not set(a) & set(b):
        return []
    table = _lcs_table(a, b)
    i, j, found = len(a), len(b), []
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            found.append(i)
        elif table[i, j - 1] > table[i - 1, j]:
            j -= 1
        else:
            i -= 1
    return found


def _lcs_table(a: Tokens, b: Tokens) -> NDArray[np.int32]:
    numbers = {token: n for n, token in enumerate({*a, *b})}
    ids = np.array([numbers[token] for token in b])
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=np.int32)
    for i, token in enumerate(a, 1):
        diagonal = np.where(ids == numbers[token], table[i - 1, :-1] + 1, 0)
        table[i, 1:] = np.maximum.accumulate(np.maximum(table[i - 1, 1:], diagonal))
    return table
