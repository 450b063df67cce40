"""Our ROUGE is rouge-score's, to 1e-12, on random pairs and real summaries; and it reads Chinese."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camelid.errors import InputError
from camelid.evaluate import rouge
from camelid.evaluate.rouge import KINDS, best_scores, cutter, lcs_length, pair_scores

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
SCORERS = {stem: rouge_scorer.RougeScorer(list(KINDS), use_stemmer=stem) for stem in (False, True)}
CUTS = {stem: cutter("words", stem) for stem in (False, True)}
WORDS = st.sampled_from(
    ["the", "cat", "cats", "running", "runs", "Sat", "x1", "3.5", "naïve", "—", "don't", "中文", "a"]
)
TEXTS = st.lists(st.lists(WORDS, max_size=9).map(" ".join), max_size=4).map("\n".join)


def equal(hypothesis: str, reference: str, stem: bool) -> None:
    theirs = SCORERS[stem].score(reference, hypothesis)
    ours = pair_scores(hypothesis, reference, CUTS[stem])
    for kind in KINDS:
        assert ours[kind] == pytest.approx(tuple(theirs[kind]), abs=1e-12), kind


@given(TEXTS, TEXTS, st.booleans())
@settings(max_examples=300, deadline=None)
def test_random_pairs(hypothesis: str, reference: str, stem: bool) -> None:
    equal(hypothesis, reference, stem)


@pytest.mark.nightly
@given(TEXTS, TEXTS, st.booleans())
@settings(max_examples=10_000, deadline=None)
def test_ten_thousand_random_pairs(hypothesis: str, reference: str, stem: bool) -> None:
    equal(hypothesis, reference, stem)


@given(TEXTS, st.lists(TEXTS, min_size=2, max_size=3))
@settings(max_examples=100, deadline=None)
def test_several_references(hypothesis: str, references: list[str]) -> None:
    theirs = SCORERS[True].score_multi(references, hypothesis)
    ours = best_scores(hypothesis, references, CUTS[True])
    for kind in KINDS:
        assert ours[kind][2] == pytest.approx(theirs[kind].fmeasure, abs=1e-12)


@given(st.lists(st.integers(0, 5).map(str), max_size=80), st.lists(st.integers(0, 5).map(str), max_size=80))
def test_lcs_by_bits_is_the_table(a: list[str], b: list[str]) -> None:
    row = [0] * (len(b) + 1)
    for x in a:
        before = row[:]
        for j, y in enumerate(b):
            row[j + 1] = before[j] + 1 if x == y else max(row[j], before[j + 1])
    assert lcs_length(a, b) == row[-1]


def test_real_summaries(data: Path) -> None:
    expected = json.loads((data / "eval/summ/cnndm_lead3_expected_rouge.json").read_text())
    lines = [json.loads(x) for x in (data / "eval/summ/cnndm_lead3.jsonl").read_text().splitlines()]
    said, wanted = [x["prediction"] for x in lines], [x["reference"] for x in lines]
    for name, stem in (("stem", True), ("nostem", False)):
        found = rouge(said, [wanted], stemmer=stem, bootstrap=0)
        for kind in KINDS:
            assert found[kind]["fmeasure"] == pytest.approx(expected["mean_f"][name][kind], abs=1e-12)
        for a, b in zip(said, wanted, strict=True):
            equal(a, b, stem)


def test_the_interval_is_of_the_mean() -> None:
    """Half of what 95 % of means of so many pairs fall into: 1.96 standard errors."""
    rng = np.random.default_rng(3)
    words = [[str(rng.integers(6)) for _ in range(12)] for _ in range(400)]
    said, wanted = [" ".join(w) for w in words[:200]], [" ".join(w) for w in words[200:]]
    found = rouge(said, [wanted], bootstrap=2000, items=True)
    for kind in KINDS:
        scores = np.array([item[kind] for item in found["items"]])
        assert found[kind]["interval"] == pytest.approx(1.96 * scores.std() / np.sqrt(len(scores)), rel=0.06)


def test_chinese() -> None:
    found = rouge(["骆驼在沙漠里走"], [["骆驼走在沙漠里"]], tokenize="zh", bootstrap=0)
    assert found["rouge1"]["fmeasure"] == 1
    assert found["rougeL"]["fmeasure"] == pytest.approx(6 / 7)
    assert "tokenizer zh" in found["protocol"]
    wrong = rouge(["骆驼在沙漠里走"], [["骆驼走在沙漠里"]], bootstrap=0)
    assert wrong["rouge1"]["fmeasure"] == 0
    assert "1 references hold no token" in wrong["warning"]
    with pytest.raises(InputError, match="no ROUGE tokenizer named 'chinese'"):
        rouge(["a"], [["a"]], tokenize="chinese")
