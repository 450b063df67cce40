"""Mask what identifies a person: e-mail and public IP addresses, phone, identity and card numbers, secret keys.

Every pattern begins with something rare, so that the scan is fast. Numbers count with their checksum, or in a form
that seldom is anything else: eleven digits from 1 on may be money, four short numbers a version (after "version",
"v", "section" and the like they are not masked). A mask names what stood there: "<EMAIL>".
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of personal data: a pattern, what a text must hold for it (one of them; none: anything), a test of
    what it found, and what before it tells that it is something else."""

    name: str
    pattern: re.Pattern[str]
    needs: tuple[str, ...] = ()
    holds: Callable[[str], bool] = lambda found: True
    unless: re.Pattern[str] | None = None  # stands right before it


def _digits(text: str) -> str:
    return "".join(c for c in text if c.isascii() and c.isdigit())


def luhn(digits: str) -> bool:
    """The checksum of payment cards (ISO/IEC 7812-1)."""
    total = 0
    for i, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + i % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def card(found: str) -> bool:
    """Thirteen to nineteen digits of a known issuer's range, with the right checksum."""
    digits = _digits(found)
    return 13 <= len(digits) <= 19 and digits[0] in "3456" and len(set(digits)) > 1 and luhn(digits)


def chinese_id(found: str) -> bool:
    """An 18-character resident identity number: region, a possible birth date, checksum (GB 11643-1999)."""
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    year, month, day = int(found[6:10]), int(found[10:12]), int(found[12:14])
    if not (1900 <= year <= 2100 and 1 <= month <= 12 and 1 <= day <= 31):
        return False
    return "10X98765432"[sum(int(d) * w for d, w in zip(found, weights, strict=False)) % 11] == found[17].upper()


def public_address(found: str) -> bool:
    """An IP address that is reachable from outside; 127.0.0.1 and 192.168.… identify nobody."""
    try:
        return ipaddress.ip_address(found).is_global
    except ValueError:
        return False


def phone(found: str) -> bool:
    """Seven to fifteen digits (E.164)."""
    return 7 <= len(_digits(found)) <= 15


VERSION = re.compile(
    r"(?:\b(?:v|ver|version|release|build|firmware|driver|section|sec|chapter|clause|table|figure)\.?|§|版本|章节) ?\Z",
    re.I,
)

# The character that a pattern begins with comes before the look behind it: so the scan can skip to it.
KINDS: tuple[Kind, ...] = (
    Kind("EMAIL", re.compile(
        r"[A-Za-z0-9_](?<![\w.+-].)[\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])", re.A), ("@",)),
    Kind("KEY", re.compile(
        r"-----BEGIN (?:RSA |EC |OPENSSH |DSA )?PRIVATE KEY-----.{0,8000}?"
        r"-----END (?:RSA |EC |OPENSSH |DSA )?PRIVATE KEY-----"
        r"|(?<![\w-])(?:sk-(?:proj-|ant-)?[A-Za-z0-9_-]{20,200}|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{60,255}"
        r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{35}|hf_[A-Za-z0-9]{30,50}|xox[abprs]-[A-Za-z0-9-]{10,200}"
        r"|glpat-[\w-]{20}|eyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]{10,2000})(?![\w-])", re.A | re.S),
        ("-----BEGIN ", "sk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "AKIA", "ASIA", "AIza", "hf_",
         "xox", "glpat-", "eyJ")),
    Kind("CN_ID", re.compile(r"[1-9](?<![\dA-Za-z].)\d{16}[\dXx](?![\dA-Za-z])", re.A), holds=chinese_id),
    Kind("CARD", re.compile(r"[3-6](?<![\w.].)\d{3}(?:[ -]?\d{4,6}){2,3}(?:[ -]?\d{1,4})?(?![\w])", re.A), holds=card),
    Kind("IP", re.compile(r"\d(?<![\w.].)\d{0,2}(?:\.\d{1,3}){3}(?![\w]|\.\d)", re.A), holds=public_address,
         unless=VERSION),
    Kind("IP", re.compile(r"[23](?<![\w:.].)[0-9a-fA-F]{3}(?::[0-9a-fA-F]{0,4}){2,7}(?![\w:])", re.A), (":",),
         public_address),
    # International with +, North American, Chinese mobile and landline numbers.
    Kind("PHONE", re.compile(
        r"[+(\d](?:(?<=\+)(?<![\w+.].)\d{1,3}[ .-]?\(?\d{1,4}\)?(?:[ .-]?\d{2,4}){2,4}(?![\w])"
        r"|(?<![\w.+-].)(?:(?<=\()\d{3}\) ?|(?<=\d)\d{2}[.-])\d{3}[.-]\d{4}(?![\w.-]*\d)"
        r"|(?<=1)(?<![\w.+-].)[3-9]\d(?:[ -]?\d{4}){2}(?![\w-])"
        r"|(?<=0)(?<![\w.+-].)\d{2,3}-\d{7,8}(?![\w-]))", re.A), holds=phone),
)  # fmt: skip


def mask(text: str, counts: Counter[str]) -> str:
    """`text` with what it reveals replaced by the kind's name; `counts` gains how often each was."""

    def replace(kind: Kind) -> Callable[[re.Match[str]], str]:
        def one(match: re.Match[str]) -> str:
            before = match.string[max(0, match.start() - 16) : match.start()]
            if not kind.holds(match[0]) or (kind.unless and kind.unless.search(before)):
                return match[0]
            counts[kind.name] += 1
            return f"<{kind.name}>"

        return one

    for kind in KINDS:
        if not kind.needs or any(part in text for part in kind.needs):
            text = kind.pattern.sub(replace(kind), text)
    return text
