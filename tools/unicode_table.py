"""Writes camelid/tokenizer/unicode.txt: what the `tokenizers` library takes for letters, numbers and blanks.

Three lines of hexadecimal ranges. Run it when the library moves to another Unicode version (a test says so).
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

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


if __name__ == "__main__":
    TARGET.write_text("".join(ranges(pattern) + "\n" for pattern in CLASSES), encoding="ascii")
