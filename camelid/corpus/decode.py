"""Bytes to text when nobody says, or somebody says wrongly, which encoding they are in."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from contextlib import suppress

from camelid.errors import MissingExtra

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_META = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w-]{2,40})""", re.I)
SAMPLE = 1 << 16
# What browsers read where a page says the first (WHATWG encoding standard).
_WIDER = {"gb2312": "gb18030", "gbk": "gb18030", "iso-8859-1": "cp1252", "latin-1": "cp1252", "ascii": "cp1252",
          "us-ascii": "cp1252", "shift_jis": "cp932", "euc-kr": "cp949", "ks_c_5601-1987": "cp949"}  # fmt: skip
_EAST_ASIAN = ("gb", "big5", "hz", "cp932", "cp949", "cp950", "euc", "shift", "iso2022")
MIXED_SHARE = 0.25  # up to this share of lines may be in a second encoding


class Undecodable(ValueError):
    """Not text in any encoding we can tell. The argument is the reason under which it is quarantined."""


def decode(raw: bytes, declared: str | None = None) -> str:
    """The text of `raw`. `declared` is an encoding somebody stated; it is believed only when it fits.

    Order: byte order mark, ISO-2022-JP by its escapes, UTF-8, UTF-16 by its zeros, the declared one, UTF-8 with some
    lines in another encoding, detection. Raises Undecodable with "binary" or "unknown_encoding".
    """
    for mark, name in _BOMS:
        if raw.startswith(mark) and (text := _strict(raw, name)) is not None:
            return text
    if b"\x1b$" in raw and raw.isascii() and (text := _strict(raw, "iso2022_jp")) is not None:
        return text
    if (text := _strict(raw, "utf-8")) is not None:
        if raw.count(0) > len(raw) // 100 and (wide := _utf16(raw)) is not None:
            return wide
        return text
    if (text := _utf16(raw)) is not None:
        return text
    if raw.count(0) > len(raw) // 1000 + 1:
        raise Undecodable("binary")
    name = (declared or "").strip().lower()
    if name and name != "utf-8" and (text := _strict(raw, _WIDER.get(name, name))) is not None and plausible(text):
        return text
    if (text := _mixed(raw)) is not None:
        return text
    if (text := _detected(raw)) is not None:
        return text
    raise Undecodable("unknown_encoding")


def declared_in_page(page: bytes) -> str | None:
    """The encoding that an HTML page states about itself in its first kilobytes."""
    found = _META.search(page[:4096])
    return found[1].decode("ascii", "replace") if found else None


def plausible(text: str) -> bool:
    """Control characters and private-use characters show that an encoding was guessed wrongly."""
    sample = text[:SAMPLE]
    strange = sum(
        1 for c in sample if "\x7f" <= c <= "\x9f" or "\ue000" <= c <= "\uf8ff" or (c < " " and c not in "\t\n\r\f")
    )
    return strange <= len(sample) // 200


def _strict(raw: bytes, encoding: str) -> str | None:
    try:
        return raw.decode(encoding)
    except (LookupError, ValueError):  # an unknown name, one with a zero byte in it, bytes that are none of its
        return None


def _utf16(raw: bytes) -> str | None:
    """UTF-16 without a byte order mark: spaces and newlines put zeros on one side."""
    even, odd = raw[:SAMPLE:2].count(0), raw[1:SAMPLE:2].count(0)
    half = max(1, min(len(raw), SAMPLE) // 2)
    if max(even, odd) < max(1, half // 20) or min(even, odd) > max(even, odd) // 10:
        return None
    text = _strict(raw[: len(raw) & ~1], "utf-16-le" if odd > even else "utf-16-be")
    return text if text is not None and plausible(text) else None


def _mixed(raw: bytes) -> str | None:
    """UTF-8 in which some lines are in another encoding: each line is decoded by itself."""
    lines = raw.split(b"\n")
    decoded = [_strict(line, "utf-8") for line in lines]
    wide = sum(1 for line, text in zip(lines, decoded, strict=True) if text is not None and not line.isascii())
    bad = [line for line, text in zip(lines, decoded, strict=True) if text is None]
    # Without UTF-8 beyond ASCII the file is not mixed, it is in the other encoding.
    if len(bad) > MIXED_SHARE * len(lines) or (not wide and len(bad) > len(lines) // 100):
        return None
    other = _detected(b"\n".join(bad))
    if other is None:
        return None
    replacements = iter(other.split("\n"))
    return "\n".join(text if text is not None else next(replacements, "") for text in decoded)


def encoding_of(head: bytes) -> str | None:
    """What the beginning of a file of lines is in, for `decode` of each: one line tells too little. None for UTF-8,
    some lines of it in another encoding or not, and when it cannot be told."""
    lines = head[: head.rfind(b"\n") + 1]
    if not lines:  # the first line is longer: it may be cut inside a character
        lines = head
        with suppress(UnicodeDecodeError):
            codecs.getincrementaldecoder("utf-8")().decode(head)
            return None
    if _strict(lines, "utf-8") is not None or _utf16(lines) is not None or _mixed(lines) is not None:
        return None
    return next((name for name, _ in _guesses(lines)), None)


def decode_line(line: bytes, encoding: str | None) -> str:
    """One line of a file that begins in `encoding` (`encoding_of`). What is UTF-8 by chance is, in an East Asian
    encoding, two letters that are not. Raises Undecodable."""
    if encoding and encoding.startswith(_EAST_ASIAN) and (text := _strict(line, encoding)) is not None:
        return text
    return decode(line, encoding)


def _detected(raw: bytes) -> str | None:
    return next((text for _, text in _guesses(raw)), None)


def _guesses(raw: bytes) -> Iterator[tuple[str, str]]:
    """(encoding, text) by two detectors; the guess must decode every byte."""
    try:
        from charset_normalizer import from_bytes
        from resiliparse.parse.encoding import detect_encoding
    except ImportError:
        raise MissingExtra("resiliparse", "data", "text that is not UTF-8") from None
    sample = raw[:SAMPLE]
    for detect in (detect_encoding, lambda sample: getattr(from_bytes(sample).best(), "encoding", None)):
        found = str(detect(sample) or "utf-8")
        name = _WIDER.get(found, found)
        text = _strict(raw, name) if name != "utf-8" else None
        if text is not None and plausible(text):
            yield name, text
