"""Two evaluations of the same data, side by side: the difference, its 95 % interval, and how likely chance is to make
as large a one.

BLEU and chrF by sacrebleu's own paired bootstrap (Koehn 2004); right and wrong answers by McNemar's exact test; what is
a mean over documents or pairs by a paired bootstrap of our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    data = [[entry["sha256"] for entry in manifest["data"]] for manifest in (one, two)]
    if data[0] != data[1]:
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
            f"the data has {len(a['documents'])} documents, too few to draw from, and the two measurements cut them "
            f"into different windows (another tokenizer, --window or --stride): give both the same, or data of at "
            f"least {FEW} documents"
        )
    blocks = [
        np.array([math.fsum(i["nats"][at : at + BLOCK]) for i in r["items"] for at in range(0, len(i["nats"]), BLOCK)])
        for r in (a, b)
    ]
    even = np.full(len(blocks[0]), a["bytes"] / len(blocks[0]))
    return {"bits_per_byte": _ratio(blocks[0], blocks[1], even) | {"over": f"{len(even)} stretches of {BLOCK} tokens"}}


def _ratio(a: Floats, b: Floats, sizes: Floats) -> dict[str, Any]:
    """Of sums of nats over sums of bytes, in bits."""
    bits = 1 / math.log(2)
    differences = _drawn(lambda at: (b - a)[at].sum() / sizes[at].sum() * bits, len(sizes))
    return _said(float(a.sum() / sizes.sum()) * bits, float(b.sum() / sizes.sum()) * bits, differences)


def _means(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    if len(a) != len(b):
        raise InputError(f"{len(a)} items and {len(b)}: they cannot be paired")
    one, two = np.array(a), np.array(b)
    return _said(float(one.mean()), float(two.mean()), _drawn(lambda at: (two - one)[at].mean(), len(one)))


def _drawn(figure: Callable[[NDArray[np.int64]], Any], count: int) -> Floats | None:
    """A figure of samples as large as the data, drawn from it; None for too few to draw from."""
    if count < FEW:
        return None
    rng = np.random.default_rng(SEED)
    return np.array([figure(rng.integers(0, count, count)) for _ in range(SAMPLES)])


def _said(first: float, second: float, differences: Floats | None) -> dict[str, Any]:
    """p: how often the difference of a drawn sample is as far from the real one as that is from nothing."""
    difference = second - first
    found: dict[str, Any] = {"first": first, "second": second, "difference": difference}
    if differences is None:
        return found | {"interval": None, "p": None, "why": f"fewer than {FEW} to draw from"}
    far = np.abs(differences - differences.mean()) >= abs(difference)
    low, high = np.percentile(differences, [2.5, 97.5])
    p = (int(far.sum()) + 1) / (len(differences) + 1)
    return found | {"interval": [float(low), float(high)], "p": p}


def _bleu(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.significance import PairedTest

    references = [list(r) for r in zip(*(item["references"] for item in a["items"]), strict=True)]
    systems: Any = [(name, [i["hypothesis"] for i in r["items"]]) for name, r in (("first", a), ("second", b))]
    for metric in ("bleu", "chrf"):
        if a[metric]["signature"] != b[metric]["signature"]:
            raise InputError(f"the two were scored differently: {a[metric]['signature']} and {b[metric]['signature']}")
    metrics: dict[str, Any] = {
        "BLEU": BLEU(tokenize=a["bleu"]["tokenize"], references=references),
        "chrF2": CHRF(references=references),
    }
    test: Any = PairedTest(systems, metrics, references=None, test_type="bs", n_samples=SAMPLES)
    _, results = test()
    found: dict[str, dict[str, Any]] = {}
    for name, key in (("BLEU", "bleu"), ("chrF2", "chrf")):
        first, second = results[name]
        scores = float(first.score), float(second.score)
        # sacrebleu counts samples that differ by more: of two equal systems it would find none.
        p = float(second.p_value) if scores[0] != scores[1] else 1.0
        found[key] = {"first": scores[0], "second": scores[1], "difference": scores[1] - scores[0], "p": p}
        if len(a["items"]) < FEW:
            found[key] |= {"p": None, "why": f"fewer than {FEW} to draw from"}
    return found


def _answers(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Accuracies, by McNemar's exact test on the questions that only one of the two got right."""
    pairs = {"accuracy": "right"}
    if "accuracy_normalized" in a:
        pairs = {"accuracy": "picked", "accuracy_normalized": "picked_normalized"}
    if len(a["answers"]) != len(b["answers"]):
        raise InputError(f"{len(a['answers'])} questions and {len(b['answers'])}: they cannot be paired")
    if max(r.get("samples", 1) for r in (a, b)) > 1:
        raise InputError("several samples of a question have no single right and wrong: compare with --samples 1")
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
