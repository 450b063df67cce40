"""The figures that the quality rules look at: counted natively where the library is there, else by the reference here.

The two are equal to the last unit (tests/corpus/test_native.py). Counts of words, repetitions and lines follow the
published rules as datatrove implements them, so that thresholds mean the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from camelid.corpus.characters import LETTER, SOLID, SPACE, STOPS, SYMBOL, classes, is_of, lower_case
from camelid.corpus.words import words
from camelid.kernels import text as native

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
SOLID_STOP_WORDS = frozenset("的了是在不有和我他这這之也而のにはをたがでと")


@dataclass(frozen=True)
class Statistics:
    """Figures of one text; the order of the fields is the native library's. All are whole numbers.

    `*_characters` of repetitions count the characters of pieces that stood in the text before. `top_n` are the
    characters of all occurrences of the commonest n-gram, `repeated_n` those in n-grams seen before.
    """

    characters: float
    words: float
    spoken_words: float  # words that are not punctuation
    spoken_characters: float
    letter_words: float  # words with a letter
    stop_words: float  # distinct ones
    solid_stop_words: float
    hashes: float
    ellipses: float
    lines: float
    bullet_lines: float
    ellipsis_lines: float
    newlines: float
    text_lines: float  # not blank
    stopped_lines: float  # end with a sentence's stop
    short_lines: float  # up to 30 columns; a character of a solid script takes two
    repeated_text_line_characters: float
    split_lines: float
    repeated_lines: float
    repeated_line_characters: float
    paragraphs: float
    repeated_paragraphs: float
    repeated_paragraph_characters: float
    top_2: float
    top_3: float
    top_4: float
    repeated_5: float
    repeated_6: float
    repeated_7: float
    repeated_8: float
    repeated_9: float
    repeated_10: float
    solid_characters: float
    letters: float
    visible: float  # not white space

    @property
    def solid(self) -> bool:
        """Is most of it in a script without spaces?"""
        return 2 * self.solid_characters > self.letters


def measure(texts: Sequence[str]) -> list[Statistics]:
    """The figures of every text."""
    if native.ready(tables):
        return [Statistics(*row) for row in native.statistics(native.pack(texts)).tolist()]
    return [reference(text) for text in texts]


def tables() -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """What the native library needs to know of characters."""
    return classes(), lower_case()


def reference(text: str) -> Statistics:
    """The figures of one text in plain Python."""
    found = words(text)
    spoken = [w for w in found if any(not is_of(c, SYMBOL) for c in w)]
    lines = [line.strip() for line in text.splitlines()]
    text_lines = [line for line in text.split("\n") if line.strip()]
    split_lines = re.split(r"\n+", text)
    paragraphs = re.split(r"\n{2,}", text.strip())
    line_repeats, line_characters = _repeats(split_lines)
    paragraph_repeats, paragraph_characters = _repeats(paragraphs)
    counts = {
        "characters": len(text),
        "words": len(found),
        "spoken_words": len(spoken),
        "spoken_characters": sum(map(len, spoken)),
        "letter_words": sum(any(is_of(c, LETTER) for c in w) for w in found),
        "stop_words": len(STOP_WORDS.intersection(found)),
        "solid_stop_words": len(SOLID_STOP_WORDS.intersection(found)),
        "hashes": text.count("#"),
        "ellipses": text.count("...") + text.count("…"),
        "lines": len(lines),
        "bullet_lines": sum(line.startswith(("•", "-")) for line in lines),
        "ellipsis_lines": sum(line.endswith(("...", "…")) for line in lines),
        "newlines": text.count("\n"),
        "text_lines": len(text_lines),
        "stopped_lines": sum(line[-1] in STOPS for line in text_lines),
        "short_lines": sum(len(line) + sum(is_of(c, SOLID) for c in line) <= 30 for line in text_lines),
        "repeated_text_line_characters": _repeats(text_lines)[1],
        "split_lines": len(split_lines),
        "repeated_lines": line_repeats,
        "repeated_line_characters": line_characters,
        "paragraphs": len(paragraphs),
        "repeated_paragraphs": paragraph_repeats,
        "repeated_paragraph_characters": paragraph_characters,
        **{f"top_{n}": _top(found, n) for n in (2, 3, 4)},
        **{f"repeated_{n}": _repeated_ngrams(found, n) for n in range(5, 11)},
        "solid_characters": sum(is_of(c, SOLID) for c in text),
        "letters": sum(is_of(c, LETTER) for c in text),
        "visible": sum(not is_of(c, SPACE) for c in text),
    }
    return Statistics(**{f.name: float(counts[f.name]) for f in fields(Statistics)})


def _repeats(pieces: Iterable[str]) -> tuple[int, int]:
    """(how many pieces stood before, their characters)."""
    seen: set[str] = set()
    count = characters = 0
    for piece in pieces:
        if piece in seen:
            count, characters = count + 1, characters + len(piece)
        seen.add(piece)
    return count, characters


def _top(found: Sequence[str], n: int) -> int:
    grams = Counter(tuple(found[i : i + n]) for i in range(len(found) - n + 1))
    if not grams:
        return 0
    gram, count = grams.most_common(1)[0]
    return len(" ".join(gram)) * count


def _repeated_ngrams(found: Sequence[str], n: int) -> int:
    seen: set[tuple[str, ...]] = set()
    characters = at = 0
    while at + n <= len(found):
        gram = tuple(found[at : at + n])
        if gram in seen:
            characters += sum(map(len, gram))
            at += n
        else:
            seen.add(gram)
            at += 1
    return characters
