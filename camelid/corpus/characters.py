"""What each character is, for counting words in any script.

The table is made from the running Python's Unicode data and handed to the native library, so both paths read text
alike whatever their Unicode version.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

import numpy as np
from numpy.typing import NDArray

LETTER, DIGIT, SPACE, SOLID, SYMBOL, MARK, STOP, BREAK = 1, 2, 4, 8, 16, 32, 64, 128
"""SOLID: scripts written without spaces, where every character counts as a word. STOP: ends a sentence. BREAK: ends a
line as str.splitlines sees it."""

LIMIT = 0x20000
"""Code points from here on are rare Han characters up to 0x3FFFF, then nothing that is text."""

# Han, kana, Thai, Lao, Tibetan, Myanmar, Khmer, full-width letters excepted.
_SOLID = ((0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x2FDF), (0x3005, 0x3007),
          (0x3021, 0x3029), (0x3041, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
          (0xFF66, 0xFF9F), (0x1B000, 0x1B16F))  # fmt: skip
STOPS = ".!?։؟۔।॥။၊።፧፨。．｡！？…‼⁇⁈⁉‽។៕"


def _bits(character: str) -> int:
    category = unicodedata.category(character)
    bits = 0
    if character.isalpha():
        bits |= LETTER
    if character.isnumeric():
        bits |= DIGIT
    if character.isspace():
        bits |= SPACE
    if category[0] in "PSC" and not character.isspace():
        bits |= SYMBOL
    if category[0] == "M":
        bits |= MARK
    return bits


@cache
def classes() -> NDArray[np.uint8]:
    """Bits of every code point below LIMIT: uint8 [LIMIT]."""
    table = np.fromiter((_bits(chr(c)) for c in range(LIMIT)), np.uint8, LIMIT)
    for first, last in _SOLID:
        part = table[first : last + 1]
        part[(part & (LETTER | DIGIT | MARK)) > 0] |= SOLID
    table[[ord(c) for c in STOPS if ord(c) < LIMIT]] |= STOP
    table[[ord(c) for c in "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"]] |= BREAK
    return table


@cache
def lower_case() -> NDArray[np.uint32]:
    """The lower case of every code point below LIMIT where it is a single one: uint32 [LIMIT]."""
    table = np.arange(LIMIT, dtype=np.uint32)
    for c in range(LIMIT):
        lowered = chr(c).lower()
        if len(lowered) == 1:
            table[c] = ord(lowered)
    return table


def is_of(character: str, bits: int) -> bool:
    """Whether a character has any of `bits`. From LIMIT on, what Unicode assigns or may assign is ideographs."""
    code_point = ord(character)
    if code_point >= LIMIT:
        return code_point < 0x3FFFE and bool(bits & (LETTER | SOLID))
    return bool(classes()[code_point] & bits)


@cache
def char_class(bits: int, without: int = 0, more: str = "") -> str:
    """A regular expression's character class [...] of the characters with any of `bits` and none of `without`."""
    table = classes()
    wanted = ((table & bits) > 0) & ((table & without) == 0)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], wanted.astype(np.int8), [0]))))
    ranges = [f"{_escaped(a)}-{_escaped(b - 1)}" for a, b in edges.reshape(-1, 2)]
    if bits & (LETTER | SOLID) and not without & (LETTER | SOLID):
        ranges.append("\U00020000-\U0003fffd")
    return "[" + "".join(ranges) + re.escape(more) + "]"


def _escaped(code_point: int) -> str:
    return f"\\U{code_point:08x}"
