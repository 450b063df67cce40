"""Why a document is left out: one small function a reason, one row a function, one threshold a row.

Rules and thresholds are those of Gopher (arXiv:2112.11446, table A1 and section A1.1) and FineWeb (arXiv:2406.17557,
section 3.5), as datatrove implements them. Where a rule counts words or spaces it has a form for scripts without
spaces, stated beside it; the published form would drop every Chinese page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from camelid.corpus.document import Kind
from camelid.corpus.statistics import Statistics
from camelid.errors import InputError

Test = Callable[[Statistics, float, str], bool]
"""(figures, threshold, language) -> is the document to be dropped?"""


@dataclass(frozen=True)
class Rule:
    """`name` is the reason in the counts and the key under which its threshold can be set."""

    name: str
    group: str
    threshold: float
    drops: Test


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _word_count(s: Statistics) -> float:
    """Words that are not punctuation; Chinese averages one and a half characters a word, so three make two."""
    return s.spoken_words - s.solid_characters / 3


def too_short(s: Statistics, limit: float, language: str) -> bool:
    # A character of a solid script says what two or three letters say.
    return s.characters + 1.5 * s.solid_characters < limit


def few_letters(s: Statistics, limit: float, language: str) -> bool:
    """Tables of numbers, rules and binary junk."""
    return not s.visible or s.letters / s.visible < limit


def repeated_text(s: Statistics, limit: float, language: str) -> bool:
    return _share(s.repeated_text_line_characters, s.characters) > limit


def gopher_short(s: Statistics, limit: float, language: str) -> bool:
    return _word_count(s) < limit


def gopher_long(s: Statistics, limit: float, language: str) -> bool:
    return _word_count(s) > limit


def gopher_short_words(s: Statistics, limit: float, language: str) -> bool:
    # Every word of a solid script is one character; Korean words are a syllable shorter than English ones.
    return not s.solid and _share(s.spoken_characters, s.spoken_words) < (limit - 1 if language == "ko" else limit)


def gopher_long_words(s: Statistics, limit: float, language: str) -> bool:
    return not s.solid and _share(s.spoken_characters, s.spoken_words) > limit


def gopher_hashes(s: Statistics, limit: float, language: str) -> bool:
    return _share(s.hashes, s.words) > limit


def gopher_ellipses(s: Statistics, limit: float, language: str) -> bool:
    return _share(s.ellipses, s.words) > limit


def gopher_bullets(s: Statistics, limit: float, language: str) -> bool:
    return _share(s.bullet_lines, s.lines) > limit


def gopher_ellipsis_lines(s: Statistics, limit: float, language: str) -> bool:
    return _share(s.ellipsis_lines, s.lines) > limit


def gopher_few_letter_words(s: Statistics, limit: float, language: str) -> bool:
    # Where every character is a word, punctuation weighs more: one mark in seven characters is ordinary Chinese.
    return _share(s.letter_words, s.words) < (limit - 0.1 if s.solid else limit)


def gopher_stop_words(s: Statistics, limit: float, language: str) -> bool:
    """Running text has function words: the, of, … in English, 的, 是, の, … in Chinese and Japanese."""
    if language in ("zh", "ja"):
        return s.solid_stop_words < limit
    return language == "en" and s.stop_words < limit


def repeated_lines(s: Statistics, limit: float, language: str) -> bool:
    return _share(s.repeated_lines, s.split_lines) > limit


def repeated_paragraphs(s: Statistics, limit: float, language: str) -> bool:
    return _share(s.repeated_paragraphs, s.paragraphs) > limit


def repeated_line_characters(s: Statistics, limit: float, language: str) -> bool:
    return _share(s.repeated_line_characters, s.characters) > limit


def repeated_paragraph_characters(s: Statistics, limit: float, language: str) -> bool:
    return _share(s.repeated_paragraph_characters, s.characters) > limit


def _top(n: int) -> Test:
    return lambda s, limit, language: _share(getattr(s, f"top_{n}"), s.characters) > limit


def _repeated(n: int) -> Test:
    # Five words are about eight characters of a solid script: there only n-grams of 8 and more mean repetition.
    def drops(s: Statistics, limit: float, language: str) -> bool:
        return not (s.solid and n < 8) and _share(getattr(s, f"repeated_{n}"), s.characters) > limit

    return drops


def fineweb_few_stopped_lines(s: Statistics, limit: float, language: str) -> bool:
    return _share(s.stopped_lines, s.text_lines) < limit


def fineweb_short_lines(s: Statistics, limit: float, language: str) -> bool:
    return _share(s.short_lines, s.text_lines) > limit


def fineweb_repeated_lines(s: Statistics, limit: float, language: str) -> bool:
    return _share(s.repeated_text_line_characters, s.characters - s.newlines) > limit


def fineweb_list(s: Statistics, limit: float, language: str) -> bool:
    return _share(s.newlines, s.words - s.solid_characters / 3) > limit


RULES: tuple[Rule, ...] = (
    Rule("too_short", "basic", 50, too_short),
    Rule("few_letters", "basic", 0.4, few_letters),
    Rule("repeated_text", "basic", 0.5, repeated_text),
    Rule("gopher_short", "gopher_quality", 50, gopher_short),
    Rule("gopher_long", "gopher_quality", 100_000, gopher_long),
    Rule("gopher_short_words", "gopher_quality", 3, gopher_short_words),
    Rule("gopher_long_words", "gopher_quality", 10, gopher_long_words),
    Rule("gopher_hashes", "gopher_quality", 0.1, gopher_hashes),
    Rule("gopher_ellipses", "gopher_quality", 0.1, gopher_ellipses),
    Rule("gopher_bullets", "gopher_quality", 0.9, gopher_bullets),
    Rule("gopher_ellipsis_lines", "gopher_quality", 0.3, gopher_ellipsis_lines),
    Rule("gopher_few_letter_words", "gopher_quality", 0.8, gopher_few_letter_words),
    Rule("gopher_stop_words", "gopher_quality", 2, gopher_stop_words),
    Rule("repeated_paragraphs", "gopher_repetition", 0.3, repeated_paragraphs),
    Rule("repeated_paragraph_characters", "gopher_repetition", 0.2, repeated_paragraph_characters),
    Rule("repeated_lines", "gopher_repetition", 0.3, repeated_lines),
    Rule("repeated_line_characters", "gopher_repetition", 0.2, repeated_line_characters),
    *(Rule(f"top_{n}_gram", "gopher_repetition", t, _top(n)) for n, t in ((2, 0.2), (3, 0.18), (4, 0.16))),
    *(
        Rule(f"repeated_{n}_grams", "gopher_repetition", t, _repeated(n))
        for n, t in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    ),
    Rule("fineweb_few_stopped_lines", "fineweb", 0.12, fineweb_few_stopped_lines),
    Rule("fineweb_short_lines", "fineweb", 0.67, fineweb_short_lines),
    Rule("fineweb_repeated_lines", "fineweb", 0.01, fineweb_repeated_lines),
    Rule("fineweb_list", "fineweb", 0.3, fineweb_list),
)
GROUPS = ("basic", "c4", "gopher_quality", "gopher_repetition", "fineweb")
WEB_GROUPS = ("basic", "gopher_quality", "gopher_repetition", "fineweb")


def groups_for(kind: Kind, wanted: Sequence[str]) -> tuple[str, ...]:
    """The groups that apply to a kind of document; "auto" asks the web's rules of web pages only."""
    if list(wanted) != ["auto"]:
        return tuple(wanted)
    return WEB_GROUPS if kind in ("html", "web") else ("basic",)


def check_names(wanted: Sequence[str], limits: Mapping[str, float]) -> None:
    """Raise InputError for an unknown group or rule."""
    for group in wanted:
        if group not in (*GROUPS, "auto"):
            raise InputError(f"corpus.filters: no filter group {group!r}; choose from auto, {', '.join(GROUPS)}")
    for name in limits:
        if name not in {rule.name for rule in RULES}:
            raise InputError(f"corpus.limits: no rule {name!r}; known: {', '.join(rule.name for rule in RULES)}")


def reason_to_drop(
    s: Statistics, language: str, groups: Sequence[str], limits: Mapping[str, float] | None = None
) -> str | None:
    """The first rule of these groups that drops a document, or None."""
    limits = limits or {}
    for rule in RULES:
        if rule.group in groups and rule.drops(s, limits.get(rule.name, rule.threshold), language):
            return rule.name
    return None
