"""Text to words and sentences: the reference that the native library is tested against.

Words are close to spaCy's English tokens, which the published filters were tuned on: punctuation stands by itself,
clitics are cut off ("do" "n't"), numbers, addresses, "U.S." and "Dr." stay whole. A character of a script without
spaces is a word, so that rules that count words hold for Chinese, Japanese and Thai.
"""

from __future__ import annotations

import re
from functools import cache

from camelid.corpus.characters import DIGIT, LETTER, MARK, SOLID, STOPS, SYMBOL, char_class

CLITICS = {"s", "d", "m", "re", "ve", "ll"}
# Keep their full stop, as single letters ("J.") and letters with stops between them ("p.m.") do.
ABBREVIATIONS = """
Mr Mrs Ms Dr St Prof Jr Sr Rev Gen Gov Sen Rep Adm Bros Co Corp Inc Ltd Messrs vs
Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec
"""


@cache
def _pattern() -> re.Pattern[str]:
    """Finds words, clitics still attached; made on first use, for its character classes take a moment."""
    word = char_class(LETTER | DIGIT | MARK, without=SOLID, more="_")
    letter = char_class(LETTER, without=SOLID)
    digit = char_class(DIGIT, without=SOLID)
    joined = (
        f"(?<={digit})[.,:/](?={digit})"
        f"|(?<={letter})(?:\\.(?![A-ZÀ-Þ])|(?<![a-zß-ÿ])\\.|['’])(?={letter})"
        f"|@(?={word})"
        f"|(?<={letter})-(?={digit})"
    )
    short = rf"(?:[A-Za-z](?:\.[A-Za-z])*|{'|'.join(ABBREVIATIONS.split())})\.(?!\.|{word})"
    return re.compile(
        rf"(?:https?://|ftp://|www\.)\S*[^\s.,;:!?)\]'\">]|{short}|{word}+(?:(?:{joined}){word}+)*|{char_class(SOLID)}|\.\.+|\S"
    )


def words(text: str) -> list[str]:
    """The words of a text, punctuation included."""
    found: list[str] = []
    for word in _pattern().findall(text):
        at = max(word.rfind("'"), word.rfind("’")) if len(word) > 1 else -1
        if at > 0:
            tail = word[at + 1 :].lower()
            if tail == "t" and at > 1 and word[at - 1] in "nN":
                found += [word[: at - 1], word[at - 1 :]]
                continue
            if tail in CLITICS:
                found += [word[:at], word[at:]]
                continue
        found.append(word)
    return found


@cache
def _punctuation() -> re.Pattern[str]:
    return re.compile(char_class(SYMBOL) + "+")


def count_sentences(found: list[str]) -> int:
    """Sentences in these words: a stop followed, after any punctuation, by something else (spaCy's sentencizer)."""
    count, stopped = (1 if found else 0), False
    for word in found:
        if len(word) == 1 and word in STOPS:
            stopped = True
        elif stopped and not _punctuation().fullmatch(word):
            count += 1
            stopped = False
    return count
