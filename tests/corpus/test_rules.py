"""What is kept and why: rules on real and made-up text, in English and Chinese; native equals reference."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from ftfy.badness import is_bad
from hypothesis import example, given, settings
from hypothesis import strategies as st

from camelid.corpus import c4, shingles, statistics
from camelid.corpus.extract import main_text
from camelid.corpus.filters import GROUPS, WEB_GROUPS, reason_to_drop
from camelid.corpus.language import identify
from camelid.corpus.minhash import band_keys, candidates, clusters
from camelid.corpus.ngram import ORDER, _grams
from camelid.corpus.pii import mask
from camelid.corpus.repair import damaged, polish, repair
from camelid.corpus.statistics import measure
from camelid.corpus.words import count_sentences, words
from camelid.kernels import text as native


def reason(text: str, language: str = "en", groups: tuple[str, ...] = WEB_GROUPS) -> str | None:
    return reason_to_drop(measure([text])[0], language, groups)


def test_repair() -> None:
    assert repair("The cafÃ© is open\r\n\x00ok  ") == "The café is open\nok"
    assert repair("“quotes” stay, ﬁ too") == "“quotes” stay, ﬁ too"
    assert repair("e\u0301") == "é"
    assert repair("one\x0btwo\x0cthree") == "one\ntwo\nthree"


DAMAGE = st.text(st.sampled_from("ÃÂ€œâ™é“”ÐÎŠš©»¿½ØÙ\xa0вЂß√°≈"), min_size=1, max_size=4)
SOUND = st.text(st.sampled_from("abcZ .,?!\n中あ가"), max_size=12)


@given(st.lists(DAMAGE | SOUND, max_size=8).map("".join))
@settings(max_examples=500, deadline=None)
def test_damage_is_what_ftfy_calls_bad(text: str) -> None:
    assert damaged(text) == is_bad(text)


def test_what_is_not_the_authors_goes() -> None:
    start, end = "*** START OF THE PROJECT GUTENBERG EBOOK X ***", "*** END OF THE PROJECT GUTENBERG EBOOK"
    book = f"licence\n{start}\n\nThe story.\n\n{end}\nmore"
    assert polish(book, "text") == "The story."
    books = "\n".join(
        f"licence\n{start}\n\nStory {n}.\n\nEnd of the Project Gutenberg EBook\n{end}\nmore" for n in (1, 2, 3)
    )
    assert polish(books, "text") == "Story 1.\n\nStory 2.\n\nStory 3."
    story, small = "The story. " * 8000, "*END THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*"
    for end_of in ("End of The Project Gutenberg Etext of X\nlicence\n", "", f"{end}\nlicence\n"):  # of about 2002
        assert polish(f"The Project Gutenberg Etext\n{story}\n{end_of}{small}\n", "text").count("story") == 8000
    unended = f"{start}\n{story}\nEnd of this Project Gutenberg Etext\nlicence\n"
    assert polish(f"{start}\n{story}\n{unended}", "text").count("story") == 16_000
    assert "licence" not in polish(unended, "text")
    part = f"The end of one.\n{end}\nlicence\n{start}\n\nThe next, gutenberg."
    assert polish(part, "text") == "The end of one.\n\nThe next, gutenberg."
    assert polish(f"{start}\nsmall print\n{start}\n\nThe story.", "text") == "The story."
    assert polish("A line.\nShare this on Facebook\nA line.\nPrivacy Policy", "web") == "A line."


@pytest.mark.parametrize(
    ("suffix", "code", "kept"),
    [
        ("sh", "#!/bin/sh\n# Copyright 2020 A. N. Other\n# All rights reserved\n\nx = 1", "#!/bin/sh\nx = 1"),
        ("py", "# A comment on the code\nx = 1", "# A comment on the code\nx = 1"),
        ("py", "# How it works.\n\n# License: MIT\nimport os", "# How it works.\n\nimport os"),
        ("py", "# Copyright X\n#\n# Licensed under Y\n\n# What follows.\nx = 1", "# What follows.\nx = 1"),
        ("c", "// Copyright X\n#include <stdio.h>\n#define N 3\n\nint x;", "#include <stdio.h>\n#define N 3\n\nint x;"),
        ("h", '#include "license.h"\n#ifndef A_H\n#define A_H\n\nint x;\n#endif', None),
        ("rs", "/* SPDX-License-Identifier: MIT */\n\n#[derive(Debug)]\nstruct A;", "#[derive(Debug)]\nstruct A;"),
        ("c", "/* Copyright X */ int f;\n/* helper */\nint g;", "int f;\n/* helper */\nint g;"),
        ("js", "/*! MIT license */(function(){})();\n/* more */\nvar b=2;", "(function(){})();\n/* more */\nvar b=2;"),
        ("lua", "-- Copyright X\nlocal a = 1", "local a = 1"),
        ("js", "/* What it does. */\n/* (c) Copyright X */\nlet a = 1", "/* What it does. */\nlet a = 1"),
    ],
)
def test_licences_go_and_code_stays(suffix: str, code: str, kept: str | None) -> None:
    assert polish(code, "code", f"src/a.{suffix}") == (code if kept is None else kept)
    for part in ("#2", "@33554432", "@33554432#2", " (part 2)", " (part 2)#3"):
        assert polish(code, "code", f"src/a.{suffix}{part}") == (code if kept is None else kept)


def test_words_are_close_to_spacys() -> None:
    text = (
        "Don't panic: it's O'Brien's U.S. at 3.14 or 1,000 covid-19 end.Next 中文字 a@b.com https://x.org/a?b=1). ..."
    )
    assert " ".join(words(text)) == (
        "Do n't panic : it 's O'Brien 's U.S. at 3.14 or 1,000 covid-19 end . Next 中 文 字 a@b.com "
        "https://x.org/a?b=1 ) . ..."
    )
    assert count_sentences(words("Hello. World! (Yes.) 好的。走吧")) == 5


PROSE = (
    "The camel walked through the desert and it did not stop to rest. It had been told that the water was far away, "
    "and that the others would have to wait with patience. In the evening the wind turned, the sand grew cold, and all "
    "of them sat down to be counted by the guide who knew each animal's name and every well on the road."
)
CHINESE = (
    "骆驼在沙漠里走了很久，它没有停下来休息。人们告诉它水在很远的地方，别的骆驼只能耐心地等。到了晚上，风向变了，沙子也冷了，"
    "大家都坐下来让向导数一数。向导知道每一头骆驼的名字，也知道路上的每一口井。第二天太阳还没有出来，他们就又出发了。"
)


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        (PROSE, "en", None),
        (CHINESE, "zh", None),
        ("短句。", "zh", "too_short"),
        ("12 34 56 | -- 78 == 9 0 a " * 5, "en", "few_letters"),
        ("buy now and save a lot of money\n" * 10, "en", "repeated_text"),
        (PROSE[:150], "en", "gopher_short"),
        ("# " * 30 + PROSE, "en", "gopher_hashes"),
        ("- " + PROSE.replace(". ", ".\n- "), "en", "gopher_bullets"),
        (re.sub(r"\b(the|be|to|of|and|that|have|with)\b", "zu", PROSE), "en", "gopher_stop_words"),
        (PROSE + "\n\n" + "\n\n".join(["again the same words here."] * 4), "en", "repeated_paragraphs"),
        (PROSE + "\n" + "Next page\n" * 4 + "Next page.", "en", "repeated_lines"),
        (CHINESE.replace("。", "。\n").replace("，", "\n"), "zh", "fineweb_short_lines"),
    ],
)
def test_rules(text: str, language: str, expected: str | None) -> None:
    assert reason(text, language) == expected


def test_the_webs_rules_keep_chinese_novels(data: Path) -> None:
    text = (data / "corpora" / "zh" / "红楼梦.txt").read_text()
    chapters = [c for c in re.split(r"\n(?=第.{1,6}回)", text) if len(c) > 2000]
    reasons = Counter(reason(repair(c), "zh", ("basic", "gopher_quality", "gopher_repetition")) for c in chapters)
    assert reasons[None] >= 0.95 * len(chapters) > 50


LANGUAGES = {
    "zh": CHINESE,
    "en": PROSE,
    "ja": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "de": "Der Weg durch die Wüste war lang und niemand wusste, wo das Wasser lag.",
    "ru": "Все счастливые семьи похожи друг на друга.",
    "ko": "오늘은 날씨가 매우 좋습니다. 우리는 학교에 갑니다.",
    "und": "12 34",
}


@pytest.mark.parametrize("code", LANGUAGES)
def test_languages(code: str) -> None:
    assert identify(LANGUAGES[code]) == code


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to jane.doe@example.org!", "write to <EMAIL>!"),
        ("server 8.8.8.8 and 192.168.1.1, version 1.2.3.4.5", "server <IP> and 192.168.1.1, version 1.2.3.4.5"),
        ("See section 3.4.5.1, v4.2.1.7 or 版本 4.2.1.7", "See section 3.4.5.1, v4.2.1.7 or 版本 4.2.1.7"),
        ("card 4111 1111 1111 1111, not 4111 1111 1111 1112", "card <CARD>, not 4111 1111 1111 1112"),
        ("身份证11010519491231002X，不是110105194912310021", "身份证<CN_ID>，不是110105194912310021"),
        ("电话13812345678或010-62751234", "电话<PHONE>或<PHONE>"),
        ("call +44 20 7946 0958 or (212) 555-0123", "call <PHONE> or <PHONE>"),
        ("key AKIAIOSFODNN7EXAMPLE set", "key <KEY> set"),
        (
            "ISBN 978-3-16-148410-0, pi 3.14159265, 2020-12-31, 1234567",
            "ISBN 978-3-16-148410-0, pi 3.14159265, 2020-12-31, 1234567",
        ),
    ],
)
def test_personal_data(text: str, masked: str) -> None:
    assert mask(text, Counter()) == masked


def test_main_text_of_pages_is_as_good_as_the_better_tool(data: Path) -> None:
    """On 40 of the benchmark's pages, in its own measure: shingles of 4 words."""
    import gzip

    import trafilatura

    root = data / "web" / "article_extraction"
    truth = json.loads((root / "ground-truth.json").read_text())
    chosen = sorted(truth)[::4][:40]
    pages = {
        k: gzip.decompress((root / "html" / f"{k}.html.gz").read_bytes()).decode("utf-8", "replace") for k in chosen
    }

    def f1(texts: dict[str, str]) -> float:
        precision, recall = [], []
        for key, found in texts.items():
            gold, ours = (Counter(zip(*(re.findall(r"\w+", t)[i:] for i in range(4)), strict=False))
                          for t in (truth[key]["articleBody"], found))  # fmt: skip
            shared = (gold & ours).total()
            precision.append(shared / max(1, ours.total()))
            recall.append(shared / max(1, gold.total()))
        p, r = sum(precision) / len(precision), sum(recall) / len(recall)
        return 2 * p * r / (p + r)

    ours = f1({k: main_text(p) for k, p in pages.items()})
    fast = f1({k: main_text(p, "resiliparse") for k, p in pages.items()})
    alone = f1({k: trafilatura.extract(p) or "" for k, p in pages.items()})
    assert ours >= max(fast, alone)


ODD = st.text(
    alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(list("aB1 .\n'’-_,:/@#…。的[]{}"))),
    max_size=120,
)
SPELLED = [
    "JavaScript", "Privacy  Policy", "privacy policy", "USE OF COOKIES", "use cookies", "uses cookies", "terms of use",
    "cookie policy", "lorem ipsum", "Lorem Ipsum", "[edit]", "[12]", "[]", "[citation needed]", "{", ".\n", "。\n",
    "...\n", "\u201d\n", " ", "One two three four", "z.B.", "第一句", "w" * 1001,
]  # fmt: skip
PIECES = st.one_of(st.sampled_from(SPELLED), st.characters(exclude_categories=["Cs"]))
LINES = st.lists(PIECES, max_size=30).map("".join)


@pytest.mark.skipif(not native.ready(statistics.tables), reason="the native library is not built")
class TestNative:
    @settings(max_examples=300, deadline=None)
    @example(['{\U00020000\U0003fffe"'])  # a curly bracket in a line of two words: what is no character begins none
    @example(["Das ist z.B. so. Und e.V. auch.", "p.m. U.S. a.b.C. x i.V", "z.B.x z.B.5 z.B.. xz.B. J. a.b"])
    @given(st.lists(st.one_of(ODD, LINES), min_size=1, max_size=5))
    def test_equals_the_reference(self, texts: list[str]) -> None:
        assert statistics.measure(texts) == [statistics.reference(t) for t in texts]
        for least in (0, c4.MIN_SENTENCES):
            for (ours, verdict), (expected, why) in zip(
                c4.clean(texts, least), (c4.reference(text, least) for text in texts), strict=True
            ):
                assert verdict == why
                assert ours == expected or why
        hashes, offsets = shingles.shingles(texts)
        sets = [hashes[a:b] for a, b in pairwise(offsets)]
        shared = shingles.common(sets, sets[::-1])
        sequences = shingles.sequences(texts, 3)
        signatures = shingles.signatures(hashes, offsets)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "ready", lambda tables: False)
            expected_hashes, expected_offsets = shingles.shingles(texts)
            assert np.array_equal(hashes, expected_hashes)
            assert np.array_equal(shared, shingles.common(sets, sets[::-1]))
            assert np.array_equal(offsets, expected_offsets)
            for ours_part, part in zip(sequences, shingles.sequences(texts, 3), strict=True):
                assert np.array_equal(ours_part, part)
            assert np.array_equal(signatures, shingles.signatures(hashes, offsets))

    def test_equals_the_reference_on_real_text(self, data: Path) -> None:
        texts = [json.loads(line)["text"] for line in (data / "corpora" / "c4_demo.jsonl").open()][:60]
        texts.append((data / "corpora" / "zh" / "西游记.txt").read_text()[:30_000])
        assert statistics.measure(texts) == [statistics.reference(t) for t in texts]
        assert [v for _, v in c4.clean(texts)] == [c4.reference(t)[1] for t in texts]


@pytest.mark.parametrize(
    ("line", "kept"),
    [("One two three.", True), ("One two.", False), ("One two three", False), ("One two three...", False),
     ("He said one two three.”", True), ("Enable JavaScript to see one.", False), ("We use cookies here.", False),
     ("Read our privacy policy now.", False), ("Read our cookie policy now.", False), ("By the terms of use.", False),
     ("A site that uses cookies.", False), ("About the use of cookies.", False), ("One two " + "w" * 1001 + ".", False),
     ("第一句话在这里。", True)],
)  # fmt: skip
def test_lines_of_c4(line: str, kept: bool) -> None:
    for clean in (c4.clean, lambda texts, least: [c4.reference(t, least) for t in texts]):
        assert clean([f"{line}\nA line that stays."], 0) == [(f"{line}\n" * kept + "A line that stays.", "")]
        assert clean(["Born[1] in May[citation needed] here[edit]."], 0) == [("Born in May here.", "")]
        assert clean(["Some lorem ipsum dolor sit."], 0)[0][1] == "c4_lorem_ipsum"
        assert clean(["A function f() { returns."], 0)[0][1] == "c4_curly_bracket"
        assert clean(["One two three. " * 4], 5)[0][1] == "c4_few_sentences"


def edited(text_words: list[str], similarity: float, source: np.random.Generator) -> list[str]:
    """A copy in which enough words are replaced to bring the Jaccard similarity of 5-word shingles near this."""
    n = len(text_words)
    changes = round(n * (1 - similarity) / (1 + similarity) / 5)
    copy = list(text_words)
    for at in source.choice(np.arange(3, n - 3, 6), size=changes, replace=False):
        copy[at] = f"edit{source.integers(1 << 30)}"
    return copy


def test_near_duplicates_are_found_and_nothing_else() -> None:
    """Planted edits at Jaccard 0.7, 0.8, 0.9; truth is the exact similarity of the shingle sets."""
    source = np.random.default_rng(5)
    vocabulary = [f"w{i}" for i in range(4000)]
    texts, planted = [], []
    for similarity in (0.72, 0.8, 0.9):
        for _ in range(150):
            original = [vocabulary[i] for i in source.integers(0, 4000, 400)]
            planted.append((similarity, len(texts), len(texts) + 1))
            texts += [" ".join(original), " ".join(edited(original, similarity, source))]
    hashes, offsets = shingles.shingles(texts)
    sets = [set(hashes[a:b].tolist()) for a, b in pairwise(offsets)]
    keys = band_keys(shingles.signatures(hashes, offsets), np.diff(offsets))
    pairs = {tuple(p) for band in range(keys.shape[1]) for p in candidates(keys[:, band]).tolist()}
    jaccard = {p: len(sets[p[0]] & sets[p[1]]) / len(sets[p[0]] | sets[p[1]]) for p in pairs}
    found = {p for p, j in jaccard.items() if j >= 0.7}
    for similarity, floor in ((0.72, 0.8), (0.8, 0.97), (0.9, 0.999)):
        true = [
            (a, b) for s, a, b in planted if s == similarity and len(sets[a] & sets[b]) / len(sets[a] | sets[b]) >= 0.7
        ]
        assert len(true) > 100
        assert sum(p in found for p in true) >= floor * len(true)
    assert found <= {(a, b) for _, a, b in planted}


def test_clusters_name_their_first_member() -> None:
    pairs = np.array([[5, 9], [2, 5], [7, 8]])
    assert clusters(pairs).tolist() == [[5, 2], [8, 7], [9, 2]]


def test_every_group_has_rules() -> None:
    from camelid.corpus.filters import RULES

    assert {rule.group for rule in RULES} | {"c4"} == set(GROUPS)


@pytest.mark.parametrize("text", ["", "ab", "N/A", "None", "short", "longer than the order"])
def test_grams_of_a_text_of_any_length(text: str) -> None:
    assert len(_grams(text, ORDER)) == max(0, len(text) - ORDER + 1)
