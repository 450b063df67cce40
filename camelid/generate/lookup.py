"""Guesses at the next tokens without a second model: what followed the last words where they stood before, in the
prompt or the text (prompt lookup decoding). Good for summaries, edits and code; a wrong guess costs a little time,
never the text."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 3, 2  # tokens that must be the same; the longer match is tried first


def propose(tokens: Sequence[int], most: int) -> list[int]:
    """Up to `most` tokens that followed the latest earlier place where the last tokens stood."""
    if most <= 0:
        return []
    for size in range(LONGEST, SHORTEST - 1, -1):
        wanted = list(tokens[-size:])
        for at in range(len(tokens) - size - 1, -1, -1):
            if tokens[at] == wanted[0] and list(tokens[at : at + size]) == wanted:
                return list(tokens[at + size : at + size + most])
    return []
