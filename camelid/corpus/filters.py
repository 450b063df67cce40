"""Why a document is left out. One function per reason, one row per function; the row's name appears in the counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The thresholds of all filters; every one can be set as `key=value` on the command line."""

    min_characters: int = 50
    max_repeated_line_share: float = 0.5
    min_letter_share: float = 0.4


def too_short(text: str, limits: Limits) -> bool:
    return len(text) < limits.min_characters


def repeated_lines(text: str, limits: Limits) -> bool:
    """More than the allowed share of characters lies in lines seen before (Gopher rules, arXiv:2112.11446)."""
    counts = Counter(line for line in text.splitlines() if line.strip())
    total = sum(len(line) * n for line, n in counts.items())
    repeated = sum(len(line) * (n - 1) for line, n in counts.items())
    return total > 0 and repeated / total > limits.max_repeated_line_share


def few_letters(text: str, limits: Limits) -> bool:
    """Tables of numbers, rules and binary junk: too few characters that are letters in any script."""
    dense = [c for c in text if not c.isspace()]
    return not dense or sum(c.isalpha() for c in dense) / len(dense) < limits.min_letter_share


FILTERS: dict[str, Callable[[str, Limits], bool]] = {
    "too_short": too_short,
    "repeated_lines": repeated_lines,
    "few_letters": few_letters,
}


def reason_to_drop(text: str, limits: Limits) -> str | None:
    """The first filter that drops this text, or None."""
    return next((name for name, drops in FILTERS.items() if drops(text, limits)), None)
