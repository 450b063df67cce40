"""Undo damage, and cut away what is not the author's text: licence headers, boilerplate, lines repeated in place."""

from __future__ import annotations

import re
import unicodedata

from camelid.corpus.document import Kind
from camelid.errors import MissingExtra

# C0 but for tab and newline, DEL, C1, byte order marks and non-characters inside text, bidirectional overrides.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")
# ASCII and East Asian letters, of which mis-decoded text never consists alone: three on each side of it tell enough.
_PLAIN = "[\x00-\x7f\u3000-\u30ff\u3400-\u9fff\uac00-\ud7a3]"
_LONG_PLAIN = re.compile(f"({_PLAIN}{{3}}){_PLAIN}+({_PLAIN}{{3}})")
_BLANK = re.compile(r"\n{4,}")


def repair(text: str) -> str:
    """Undo mis-decoding (ftfy), normalise to NFC and to \\n, drop control characters and trailing blanks.

    Quotes, ligatures and full-width forms are the author's; only damage is undone.
    """
    if not text.isascii():
        try:
            from ftfy import fix_encoding
        except ImportError:
            raise MissingExtra("ftfy", "data", "repairing text") from None
        if damaged(text):
            text = fix_encoding(text)
        text = unicodedata.normalize("NFC", text)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = "\n".join(line.rstrip() for line in _CONTROL.sub("", text).split("\n"))
    return _BLANK.sub("\n\n\n", text).strip("\n")


def damaged(text: str) -> bool:
    """ftfy's `is_bad`, some thirty times as fast on text that is mostly ASCII or East Asian."""
    from ftfy.badness import is_bad

    return is_bad(_LONG_PLAIN.sub(r"\1|\2", text))


_GUTENBERG_START = re.compile(
    r"^.{0,30}(?:\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG|\*END[ *]THE SMALL PRINT).*$", re.M
)
_GUTENBERG_END = re.compile(
    r"^.{0,10}(?:\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG|End of (?:the )?Project Gutenberg)", re.M
)
_GUTENBERG_CREDITS = re.compile(
    r"\A\s*(?:Produced by|E-text prepared by|Transcribed (?:from|by)|\[Illustration).*?\n\n", re.S | re.I
)


def without_gutenberg(text: str) -> str:
    """A Project Gutenberg book without the licence before and after it."""
    if "gutenberg" not in text[:20_000].lower() and "gutenberg" not in text[-30_000:].lower():
        return text
    if start := list(_GUTENBERG_START.finditer(text, 0, min(len(text), 60_000))):
        text = _GUTENBERG_CREDITS.sub("", text[start[-1].end() :])
    if end := _GUTENBERG_END.search(text, max(0, len(text) - 60_000)):
        text = text[: end.start()]
    return text.strip("\n")


_LICENCE = re.compile(r"copyright|licen[cs]e|all rights reserved|spdx-", re.I)
_LINE_COMMENTS = re.compile(r"\A(?:[ \t]*(?:(?:#|//|--|;|%)[^\n]*)?(?:\n|\Z))+")
_BLOCK_COMMENT = re.compile(r"\A\s*/\*.*?\*/[ \t]*\n?", re.S)


def without_licence(code: str) -> str:
    """Source code without a licence comment at its head; a shebang and other comments stay."""
    shebang = ""
    if code.startswith("#!"):
        shebang, _, code = code.partition("\n")
        shebang += "\n"
    head = _BLOCK_COMMENT.match(code[:20_000]) or _LINE_COMMENTS.match(code[:20_000])
    if head and _LICENCE.search(head[0]):
        code = code[head.end() :]
    return shebang + code


# Whole lines, in English and Chinese, that pages repeat and nobody wrote for the article.
_BOILERPLATE = re.compile(
    r"(?:share (?:this|on)\b.{0,40}|follow us\b.{0,40}|sign (?:up|in)|log ?in|subscribe\b.{0,60}|read more.{0,20}|"
    r"click here.{0,40}|advertisement|loading\W*|skip to (?:main )?content|back to top|print this page|email this|"
    r"all rights reserved.{0,20}|(?:©|copyright).{0,80}|(?:we|this site) uses? cookies.{0,200}|accept(?: all)? cookies|"
    r"privacy policy|terms (?:of|and) (?:use|service|conditions)|related (?:articles|posts|stories)|"
    r"leave a (?:reply|comment).{0,20}|\d+ comments?|tweet|pin it|"
    r"版权所有.{0,60}|.{0,20}保留所有权利.{0,20}|点击(?:这里|查看).{0,20}|分享(?:到|至).{0,20}|[上下]一篇.{0,60}|"
    r"返回(?:顶部|首页)|扫一扫.{0,20}|责任编辑.{0,20}|相关(?:阅读|推荐|文章)|登录|注册|关注我们.{0,20}|[京沪粤浙苏]ICP备.{0,40})\W*",
    re.I,
)


def without_boilerplate(text: str) -> str:
    """A page's text without lines that every page has, and without a line repeated directly below itself."""
    kept: list[str] = []
    last = None
    for line in text.split("\n"):
        bare = line.strip()
        if bare and (bare == last or (len(bare) < 200 and _BOILERPLATE.fullmatch(bare))):
            continue
        if bare:
            last = bare
        kept.append(line)
    return _BLANK.sub("\n\n", "\n".join(kept)).strip("\n")


def polish(text: str, kind: Kind) -> str:
    """What of `repair` and the cuts above applies to a kind of document."""
    text = repair(text)
    if kind == "code":
        return without_licence(text)
    if kind in ("html", "web"):
        return without_boilerplate(text)
    return without_gutenberg(text)
