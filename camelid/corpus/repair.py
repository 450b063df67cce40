"""Undo damage, and cut away what is not the author's text: licence headers, boilerplate, lines repeated in place."""

from __future__ import annotations

import re
import unicodedata

from camelid.corpus.document import Kind
from camelid.errors import MissingExtra

# C0 but for tab and newline, DEL, C1, byte order marks and non-characters inside text, bidirectional overrides.
# Those that C0 has between lines and pages become newlines; the others go.
_BREAKS = str.maketrans("\x0b\x0c", "\n\n")
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
    if "\x0b" in text or "\x0c" in text:
        text = text.translate(_BREAKS)
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
    r"^.{0,10}(?:\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG|End of (?:[Tt]he |[Tt]his )?Project Gutenberg)", re.M
)
_GUTENBERG_CREDITS = re.compile(
    r"\A\s*(?:Produced by|E-text prepared by|Transcribed (?:from|by)|\[Illustration).*?\n\n", re.S | re.I
)


LONGEST_LICENCE = 60_000  # characters: what stands before a book's start mark


def without_gutenberg(text: str) -> str:
    """Project Gutenberg books without the licence before and after each."""
    if "gutenberg" not in text[:20_000].lower() and "gutenberg" not in text[-30_000:].lower():
        return text
    marks = [(m.start(), m.end(), True) for m in _GUTENBERG_START.finditer(text)]
    marks += [(m.start(), m.start(), False) for m in _GUTENBERG_END.finditer(text)]
    marks.sort()
    books: list[str] = []
    # A part of a file may begin within a book; and books of about 2002 have their small print at the end.
    begin = None if marks and marks[0][2] and marks[0][0] < LONGEST_LICENCE else 0
    for at, after, start in marks:
        if start:
            if begin == 0 or (begin is not None and at - begin > LONGEST_LICENCE):  # the book before has no end mark
                books.append(text[begin:at])
            begin = after
        elif begin is not None:
            books.append(text[begin:at])
            begin = None
    if begin is not None:  # the end was cut off
        books.append(text[begin:])
    return "\n\n".join(b for book in books if (b := _GUTENBERG_CREDITS.sub("", book).strip("\n")))


_LICENCE = re.compile(r"copyright|licen[cs]e|all rights reserved|spdx-", re.I)
_BLOCK_COMMENT = r"[ \t]*/\*(?:(?!\*/).)*\*/[ \t]*\n?"  # code may follow it on its line
_MARKS = {"#": "py pyi rb pl r jl sh", "--": "lua hs sql"}  # of line comments; // in all others
_COMMENTS = {
    suffix: re.compile(rf"(?:[ \t]*{mark}[^\n]*(?:\n|\Z))+|{_BLOCK_COMMENT}|[ \t]*\n", re.S)
    for mark, suffixes in _MARKS.items()
    for suffix in suffixes.split()
}
_OTHER_COMMENTS = re.compile(rf"(?:[ \t]*//[^\n]*(?:\n|\Z))+|{_BLOCK_COMMENT}|[ \t]*\n", re.S)


def without_licence(code: str, suffix: str) -> str:
    """Source code of a kind of file ("py") without the comments of its head that are a licence; a shebang and other
    comments stay."""
    shebang, at, kept = "", 0, ""
    if code.startswith("#!"):
        shebang, _, code = code.partition("\n")
        shebang += "\n"
    comments = _COMMENTS.get(suffix, _OTHER_COMMENTS)
    while at < 20_000 and (found := comments.match(code, at)):
        at = found.end()
        kept += "" if _LICENCE.search(found[0]) else found[0]
    return shebang + (kept + code[at:]).lstrip("\n")


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


def polish(text: str, kind: Kind, source: str = "") -> str:
    """What of `repair` and the cuts above applies to a kind of document. `source` is its file, or a part of it, as
    read.py names them: name@byte, name (part 2), name#2."""
    text = repair(text)
    if kind == "code":
        return without_licence(text, re.split(r"[#@ ]", source.rpartition(".")[2])[0].lower())
    if kind in ("html", "web"):
        return without_boilerplate(text)
    return without_gutenberg(text)
