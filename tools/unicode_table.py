"""Writes camelid/tokenizer/unicode.txt: what the `tokenizers` library takes for letters, numbers and blanks.

Four lines of hexadecimal ranges; the last is for the step that cuts digits off, which has its own idea of them. Run it
when the library moves to another Unicode version (a test says so).
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex
from tokenizers.pre_tokenizers import Digits, Split

TARGET = Path(__file__).parents[1] / "camelid" / "tokenizer" / "unicode.txt"
CLASSES = (r"\p{L}+", r"\p{N}+", r"\s+")


def ranges(pattern: str) -> str:
    """The characters of a class as "41-5a 61-7a …"."""
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    found = Split(Regex(pattern), "removed", invert=True).pre_tokenize_str("".join(map(chr, points)))
    text = []
    for run, _ in found:  # U+E000, after the surrogates, is in no class: a run is a range
        first, last = ord(run[0]), ord(run[-1])
        text.append(f"{first:x}-{last:x}" if last > first else f"{first:x}")
    return " ".join(text)


def digits() -> str:
    """The characters that `Digits` cuts off."""
    points = [*range(0x80), *range(0xA0, 0xD800), *range(0xE000, 0x34000)]
    pieces = Digits(individual_digits=True).pre_tokenize_str("".join(f"x{chr(c)}" for c in points))
    found = sorted({ord(piece) for piece, _ in pieces if len(piece) == 1 and piece != "x"})
    starts = [c for c in found if c - 1 not in found]
    ends = [c for c in found if c + 1 not in found]
    return " ".join(f"{a:x}-{b:x}" if b > a else f"{a:x}" for a, b in zip(starts, ends, strict=True))


if __name__ == "__main__":
    lines = [*(ranges(pattern) for pattern in CLASSES), digits()]
    TARGET.write_text("".join(line + "\n" for line in lines), encoding="ascii")
