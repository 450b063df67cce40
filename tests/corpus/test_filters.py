"""The published thresholds, one by one, and that a text meets every step that its recipe asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from camelid.corpus import build, documents
from camelid.corpus.filters import RULES
from camelid.corpus.statistics import Statistics
from camelid.recipe import CorpusSection

from .test_rules import LANGUAGES, PROSE

NOTHING = dict.fromkeys((field.name for field in fields(Statistics)), 0.0)


def share(part: str, whole: str) -> Callable[[float], dict[str, float]]:
    return lambda value: {part: 1e6 * value, whole: 1e6}


def count(name: str) -> Callable[[float], dict[str, float]]:
    return lambda value: {name: value}


# Gopher (arXiv:2112.11446, table A1 and section A1.1) and FineWeb (arXiv:2406.17557, section 3.5); "basic" is ours.
BELOW: dict[str, tuple[float, Callable[[float], dict[str, float]]]] = {
    "too_short": (50, count("characters")),
    "few_letters": (0.4, share("letters", "visible")),
    "gopher_short": (50, count("spoken_words")),
    "gopher_short_words": (3, share("spoken_characters", "spoken_words")),
    "gopher_few_letter_words": (0.8, share("letter_words", "words")),
    "gopher_stop_words": (2, count("stop_words")),
    "fineweb_few_stopped_lines": (0.12, share("stopped_lines", "text_lines")),
}
ABOVE: dict[str, tuple[float, Callable[[float], dict[str, float]]]] = {
    "repeated_text": (0.5, share("repeated_text_line_characters", "characters")),
    "gopher_long": (100_000, count("spoken_words")),
    "gopher_long_words": (10, share("spoken_characters", "spoken_words")),
    "gopher_hashes": (0.1, share("hashes", "words")),
    "gopher_ellipses": (0.1, share("ellipses", "words")),
    "gopher_bullets": (0.9, share("bullet_lines", "lines")),
    "gopher_ellipsis_lines": (0.3, share("ellipsis_lines", "lines")),
    "repeated_paragraphs": (0.3, share("repeated_paragraphs", "paragraphs")),
    "repeated_paragraph_characters": (0.2, share("repeated_paragraph_characters", "characters")),
    "repeated_lines": (0.3, share("repeated_lines", "split_lines")),
    "repeated_line_characters": (0.2, share("repeated_line_characters", "characters")),
    **{f"top_{n}_gram": (t, share(f"top_{n}", "characters")) for n, t in ((2, 0.2), (3, 0.18), (4, 0.16))},
    **{f"repeated_{n}_grams": (0.2 - n / 100, share(f"repeated_{n}", "characters")) for n in range(5, 11)},
    "fineweb_short_lines": (0.67, share("short_lines", "text_lines")),
    "fineweb_repeated_lines": (0.01, share("repeated_text_line_characters", "characters")),
    "fineweb_list": (0.3, share("newlines", "words")),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_drops_beyond_its_published_threshold(rule: Any) -> None:
    threshold, figures = BELOW.get(rule.name) or ABOVE[rule.name]
    for factor in (0.99, 1.01):
        text = Statistics(**NOTHING | figures(threshold * factor))
        assert rule.drops(text, rule.threshold, "en") == ((factor < 1) == (rule.name in BELOW)), factor


PAGE = "<html><body><main><article><h1>A camel</h1><p>{}</p></article></main></body></html>"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "page.html").write_text(PAGE.format(PROSE[:150]))  # fewer than the 50 words that a web page needs
    (folder / "note.txt").write_text(PROSE[:150] + " Write to jane.doe@example.org.")
    (folder / "russian.txt").write_text(LANGUAGES["ru"] * 3)
    (folder / "story.txt").write_text(PROSE)
    return folder


@pytest.mark.parametrize(
    ("settings", "dropped"),
    [
        ({"languages": ["en"]}, {"gopher_short": 1, "language": 1}),
        ({}, {"gopher_short": 1}),
        ({"limits": {"gopher_short": 5}}, {"fineweb_few_stopped_lines": 1}),
        ({"limits": {"gopher_short": 5, "fineweb_few_stopped_lines": 0}}, {}),
        ({"limits": {"too_short": 250}}, {"too_short": 3}),
        ({"min_characters": 170}, {"too_short": 2}),
        ({"filters": ["basic"]}, {}),
        ({"filters": ["gopher_quality"], "languages": ["en", "ru"]}, {"gopher_short": 3}),
    ],
)
def test_what_the_recipe_says_decides(
    raw: Path, tmp_path: Path, settings: dict[str, Any], dropped: dict[str, int]
) -> None:
    section = CorpusSection(**{"workers": 1, "deduplicate": "exact"} | settings)
    assert build([raw], tmp_path / "out", section, quiet=True)["documents"]["dropped"] == dropped


@pytest.mark.parametrize("masked", [True, False])
def test_personal_data_goes_where_the_recipe_lets_it(raw: Path, tmp_path: Path, masked: bool) -> None:
    section = CorpusSection(workers=1, deduplicate="exact", mask_pii=masked)
    result = build([raw], tmp_path / "out", section, quiet=True)
    [note] = [text for text in documents(tmp_path / "out") if "Write to" in text]
    assert ("<EMAIL>" in note, "jane.doe" in note) == (masked, not masked)
    assert result["documents"]["kept"] == 3
