"""Two evaluations of the same data, side by side: the difference, its 95 % interval, and how likely chance is to make
as large a one.

BLEU and chrF by sacrebleu's own paired bootstrap (Koehn 2004); right and wrong answers by McNemar's exact test; what is
a mean over documents or pairs by a paired bootstrap of our own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camelid.errors import InputError
from camelid.evaluate.record import read

SAMPLES = 1000
SEED = 12345  # sacrebleu's
BLOCK = 256  # tokens that are drawn together where there are too few documents
FEW = 20

Floats = NDArray[np.float64]


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Of every figure both have: `first`, `second`, `difference` (second - first), `interval` of it where it was drawn,
    and `p`. Raises InputError when the two did not measure the same thing on the same data."""
    (one, a), (two, b) = read(first), read(second)
    measure = one["measure"]
    if two["measure"] != measure:
        raise InputError(f"{first} measures {measure}, {second} {two['measure']}: they cannot be compared")
    if one["data"] != two["data"]:
        raise InputError(f"{first} and {second} measured different data: {one['data']} and {two['data']}")
    if measure == "perplexity":
        found = _perplexity(a, b)
    elif measure == "rouge":
        found = {kind: _means([i[kind] for i in a["items"]], [i[kind] for i in b["items"]]) for kind in _kinds(a)}
    elif measure == "bleu":
        found = _bleu(a, b)
    else:
        found = _answers(a, b)
    protocols = [result["protocol"] for result in (a, b)]
    same = protocols[0] == protocols[1]
    return {
        "measure": measure,
        "figures": found,
        "protocol": protocols[0] if same else f"{first}: {protocols[0]}; {second}: {protocols[1]}",
        **({} if same else {"warning": "the two protocols differ, and so may what is compared"}),
    }


def _kinds(result: dict[str, Any]) -> list[str]:
    return [key for key, value in result["items"][0].items() if isinstance(value, float)]


def _perplexity(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Bits per byte, over documents; over stretches of one tokenizer's tokens where documents are few."""
    if len(a["documents"]) != len(b["documents"]):
        raise InputError("one of the two left documents out that the other scored: they cannot be paired")
    if len(a["documents"]) >= FEW:
        nats = [np.array([d["nats"] for d in r["documents"]]) for r in (a, b)]
        sizes = np.array([d["bytes"] for d in a["documents"]], dtype=np.float64)
        return {"bits_per_byte": _ratio(nats[0], nats[1], sizes) | {"over": f"{len(sizes)} documents"}}
    counts = [[len(i["nats"]) for i in r["items"]] for r in (a, b)]
    if counts[0] != counts[1]:
        raise InputError(
            f"the data has {len(a['documents'])} documents, too few to draw from, and the two tokenizers cut them "
            f"differently: give data of at least {FEW} documents"
        )
    blocks = [
        np.array([math.fsum(i["nats"][at : at + BLOCK]) for i in r["items"] for at in range(0, len(i["nats"]), BLOCK)])
        for r in (a, b)
    ]
    even = np.full(len(blocks[0]), a["bytes"] / len(blocks[0]))
    return {"bits_per_byte": _ratio(blocks[0], blocks[1], even) | {"over": f"{len(even)} stretches of {BLOCK} tokens"}}


def _ratio(a: Floats, b: Floats, sizes: Floats) -> dict[str, Any]:
    """Of sums of nats over sums of bytes, in bits."""
    drawn = _draws(len(sizes))
    bits = 1 / math.log(2)
    differences = (b - a)[drawn].sum(1) / sizes[drawn].sum(1) * bits
    return _said(float(a.sum() / sizes.sum()) * bits, float(b.sum() / sizes.sum()) * bits, differences)


def _means(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    if len(a) != len(b):
        raise InputError(f"{len(a)} items and {len(b)}: they cannot be paired")
    one, two = np.array(a), np.array(b)
    return _said(float(one.mean()), float(two.mean()), (two - one)[_draws(len(one))].mean(1))


def _draws(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(SEED).integers(0, count, (SAMPLES, count))


def _said(first: float, second: float, differences: Floats) -> dict[str, Any]:
    """p: how often the difference of a drawn sample is as far from the real one as that is from nothing."""
    difference = second - first
    far = np.abs(differences - differences.mean()) >= abs(difference)
    low, high = np.percentile(differences, [2.5, 97.5])
    p = (int(far.sum()) + 1) / (len(differences) + 1)
    return {"first": first, "second": second, "difference": difference, "interval": [float(low), float(high)], "p": p}


def _bleu(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.significance import PairedTest

    references = [list(r) for r in zip(*(item["references"] for item in a["items"]), strict=True)]
    systems: Any = [(name, [i["hypothesis"] for i in r["items"]]) for name, r in (("first", a), ("second", b))]
    tokenizer = re.search(r"tok:([^|]+)", a["bleu"]["signature"])
    metrics: dict[str, Any] = {
        "BLEU": BLEU(tokenize=tokenizer[1] if tokenizer else "13a", references=references),
        "chrF2": CHRF(references=references),
    }
    test: Any = PairedTest(systems, metrics, references=None, test_type="bs", n_samples=SAMPLES)
    _, results = test()
    found = {}
    for name, key in (("BLEU", "bleu"), ("chrF2", "chrf")):
        first, second = results[name]
        scores = float(first.score), float(second.score)
        found[key] = {"first": scores[0], "second": scores[1], "difference": scores[1] - scores[0],
                      "p": float(second.p_value)}  # fmt: skip
    return found


def _answers(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Accuracies, by McNemar's exact test on the questions that only one of the two got right."""
    pairs = {"accuracy": "right"}
    if "accuracy_normalized" in a:
        pairs = {"accuracy": "picked", "accuracy_normalized": "picked_normalized"}
    if len(a["answers"]) != len(b["answers"]):
        raise InputError(f"{len(a['answers'])} questions and {len(b['answers'])}: they cannot be paired")
    if any(x["right"] is None for x in (*a["answers"], *b["answers"])):
        raise InputError("these answers have no right and wrong: score them by `camelid evaluate bleu` or `rouge`")
    found = {}
    for figure, key in pairs.items():
        good = [[x[key] if key == "right" else x[key] == x["right"] for x in r["answers"]] for r in (a, b)]
        only = [sum(x and not y for x, y in zip(*pair, strict=True)) for pair in (good, good[::-1])]
        first, second = (sum(g) / len(g) for g in good)
        found[figure] = {
            "first": first, "second": second, "difference": second - first, "only_first": only[0],
            "only_second": only[1], "p": mcnemar(*only),
        }  # fmt: skip
    return found


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided exact p of as uneven a split of the questions on which two systems differ (McNemar 1947)."""
    count, least = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(count, k) for k in range(least + 1)) / (1 << count)
    return min(1.0, 2 * tail)
