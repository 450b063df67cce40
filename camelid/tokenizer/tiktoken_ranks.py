"""Read the `tokenizer.model` of Llama 3: a tiktoken vocabulary, one "base64 rank" a line."""

from __future__ import annotations

import base64
from pathlib import Path

from camelid.errors import FormatError

SPECIALS = 256  # control tokens, numbered after the ranks


def looks_like_ranks(path: Path) -> bool:
    """Is the first line "base64 number"? A SentencePiece model never is."""
    with path.open("rb") as file:
        first = file.readline(1000)
    token, _, rank = first.strip().partition(b" ")
    return rank.isdigit() and bool(token) and all(chr(c).isalnum() or c in b"+/=" for c in token)


def read(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank. Raises FormatError for a broken line, and for ranks with holes, doubles or missing bytes."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise FormatError(f'{path}, line {number}: not "base64 rank": {line[:40]!r}') from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise FormatError(
            f"{path}: the ranks of its {len(ranks)} tokens are not 0, 1, 2, … with none missing or double"
        )
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise FormatError(f"{path}: it has no token for byte {missing[0]:#04x}; text with it could not be encoded")
    return ranks


def special_tokens() -> list[str]:
    """The control tokens of Llama 3.1 in order of id, as its Hugging Face folder names them."""
    named = {
        0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>",
        7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>",
    }  # fmt: skip
    free = iter(range(SPECIALS))
    return [named.get(i) or f"<|reserved_special_token_{next(free)}|>" for i in range(SPECIALS)]
