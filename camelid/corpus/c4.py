"""The line rules of C4 (arXiv:1910.10683, section 2.2), for English and for scripts without spaces.

A line stays when it ends like a sentence, has enough words, and is not about JavaScript, cookies or terms of use. A
text goes that holds "lorem ipsum", a curly bracket, or too few sentences in the lines that stay.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from camelid.corpus.characters import SOLID, STOPS, is_of
from camelid.corpus.statistics import tables
from camelid.corpus.words import count_sentences, words
from camelid.kernels import text as native

VERDICTS = ("", "c4_lorem_ipsum", "c4_curly_bracket", "c4_few_sentences")
MIN_SENTENCES, MIN_WORDS, MAX_WORD_LENGTH = 5, 3, 1000
_CITATION = re.compile(r"\[[0-9]*\]|\[edit\]|\[citation needed\]")
_LINE_ENDS = tuple(STOPS.replace("…", "") + "\"'”’」』")
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


def clean(texts: Sequence[str], min_sentences: int = MIN_SENTENCES) -> list[tuple[str, str]]:
    """(the lines that stay, why the text goes or "") of every text."""
    if native.ready(tables):
        cleaned, verdicts = native.c4(native.pack(texts), min_sentences, MIN_WORDS, MAX_WORD_LENGTH)
        return [(text, VERDICTS[v]) for text, v in zip(cleaned, verdicts, strict=True)]
    return [reference(text, min_sentences) for text in texts]


def reference(text: str, min_sentences: int = MIN_SENTENCES) -> tuple[str, str]:
    """One text in plain Python."""
    kept: list[str] = []
    sentences = 0
    for line in text.splitlines():
        found = _units(line.strip())
        if any(len(word) > MAX_WORD_LENGTH for word in found):
            continue
        line = _CITATION.sub("", line.strip())
        if not line.endswith(_LINE_ENDS) or line.endswith("...") or len(found) < MIN_WORDS:
            continue
        lower = line.lower()
        if "lorem ipsum" in lower:
            return "\n".join(kept), "c4_lorem_ipsum"
        if "javascript" in lower:
            continue
        if "{" in line:
            return "\n".join(kept), "c4_curly_bracket"
        if any(policy in lower for policy in _POLICIES):
            continue
        sentences += count_sentences(words(line))
        kept.append(line)
    return "\n".join(kept), "c4_few_sentences" if sentences < min_sentences else ""


def _units(line: str) -> list[str]:
    """Words between spaces; a character of a solid script begins a new one."""
    found: list[str] = []
    for word in line.split():
        start = 0
        for i, c in enumerate(word):
            if i > start and is_of(c, SOLID):
                found.append(word[start:i])
                start = i
        found.append(word[start:])
    return found
