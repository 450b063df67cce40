"""MediaWiki dumps: pages out of the XML, and readable text out of wikitext.

Templates and tables, references, files and categories go; links keep their words. A full parser
(mwparserfromhell) reads 0.4 MB a second, a dump has tens of gigabytes: these are a few passes of regular
expressions and one scan for nested brackets.
"""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from camelid.corpus.bytestream import Stream
from camelid.corpus.document import MAX_RECORD_BYTES, Document


def read_wiki(stream: Stream, source: str) -> Iterator[Document]:
    """The articles of a dump; other namespaces and redirects are passed over, and counted."""
    between = number = 0
    while True:
        line, size = stream.line()
        if not size:
            break
        if b"<page>" not in line:
            between += size
            continue
        number += 1
        if between:
            yield Document(f"{source}:{number} (between pages)", between, skip="dump_markup")
            between = 0
        raw, size = _until_page_end(stream, line, size)
        yield _page(f"{source}:{number}", raw, size)
    if between:
        yield Document(f"{source} (end)", between, skip="dump_markup")


def _until_page_end(stream: Stream, line: bytes, size: int) -> tuple[bytes, int]:
    """The page's XML from `line` on, and its size; b"" when it is cut or too long to hold."""
    lines, whole = [line], b"</page>" in line
    while not whole:
        line, taken = stream.line()
        if not taken:
            return b"", size
        size += taken
        if size <= MAX_RECORD_BYTES:
            lines.append(line)
        whole = b"</page>" in line
    return (b"".join(lines) if size <= MAX_RECORD_BYTES else b""), size


def _page(name: str, raw: bytes, size: int) -> Document:
    if not raw:
        return Document(name, size, fault="cut_record")
    try:
        # A page fragment has no DTD, so no entity of the file's own making can be expanded.
        page = ET.fromstring(raw.decode("utf-8", "replace").strip())
    except ET.ParseError:
        return Document(name, size, fault="bad_xml")
    title = page.findtext("title") or ""
    if page.findtext("ns", "0") != "0":
        return Document(name, size, skip="wiki_namespace")
    if page.find("redirect") is not None:
        return Document(name, size, skip="wiki_redirect")
    text = page.findtext("revision/text") or ""
    return Document(f"{name} {title}", size, f"{title}\n\n{text}", "wiki")


_COMMENT = re.compile(r"<!--.*?-->", re.S)
# Elements whose content is no prose.
_ELEMENT = re.compile(
    r"<(ref|math|gallery|timeline|source|syntaxhighlight|imagemap|score|templatestyles|chem|hiero)\b"
    r"(?:[^<>]*/>|[^<>]*>.*?</\1\s*>)",
    re.S | re.I,
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,500}>")
_QUOTES = re.compile(r"'{2,5}")
_HEADING = re.compile(r"^=.*=[ \t]*$", re.M)
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:|//)[^\s\]]+\s*([^\]]*)\]")
_LIST = re.compile(r"^[*#:;]+\s*", re.M)
_MAGIC = re.compile(r"__[A-Z]+__")
_BLANK = re.compile(r"\n{3,}")
_BRACKETS = re.compile(r"\{\{|\}\}|\{\||\|\}|\[\[|\]\]")
# Files and categories, in the languages whose dumps are most used; other prefixes (interwiki) are lower-case codes.
_HIDDEN_LINK = re.compile(
    r"\s*(?:file|image|category|media|datei|kategorie|fichier|catégorie|archivo|categoría|файл|категория|文件|分类|"
    r"分類|檔案|ファイル|カテゴリ|파일|분류|(?-i:[a-z]{2,3}(?:-[a-z-]+)?))\s*:",
    re.I,
)
_EMPTY_SECTION = re.compile(r"^(=+)[^=\n]+\1\s*\n+(?=(=+)[^=\n]+\2\s*$|\Z)", re.M)
# Sections that hold lists of links and notes.
_APPARATUS = re.compile(
    r"^==\s*(?:see also|references|external links|notes|further reading|bibliography|footnotes|sources|"
    r"参考文献|參考文獻|外部链接|外部連結|参见|參見|脚注|関連項目)\s*==\s*$.*?(?=^==[^=]|\Z)",
    re.M | re.S | re.I,
)


def plain(wikitext: str) -> str:
    """The prose of an article."""
    text = _ELEMENT.sub("", _COMMENT.sub("", wikitext))
    text = _APPARATUS.sub("", _unnest(text))
    text = _EXTERNAL.sub(r"\1", _MAGIC.sub("", _QUOTES.sub("", _TAG.sub("", text))))
    text = _EMPTY_SECTION.sub("", text)
    text = _LIST.sub("", _HEADING.sub(lambda line: line[0].strip().strip("=").strip(), text))
    return _BLANK.sub("\n\n", html.unescape(text)).strip()


def _unnest(text: str) -> str:
    """Drop templates {{…}} and tables {|…|}, however nested; keep the words of links [[…]]."""
    out: list[str] = []
    open_at: list[tuple[str, int]] = []  # (opening bracket, length of `out` before it)
    at = 0
    while found := _BRACKETS.search(text, at):
        out.append(text[at : found.start()])
        at = found.end()
        bracket = found[0]
        if bracket == "|}" and open_at and open_at[-1][0] == "{{":  # "{{x|}}" ends with an empty parameter
            out.append("|")
            at -= 1
        elif bracket in ("{{", "{|", "[["):
            open_at.append((bracket, len(out)))
        elif open_at and open_at[-1][0] == {"}}": "{{", "|}": "{|", "]]": "[["}[bracket]:
            opening, start = open_at.pop()
            inside = "".join(out[start:])
            del out[start:]
            if opening == "[[":
                out.append(_link(inside))
    out.append(text[at:])
    return "".join(out)


def _link(inside: str) -> str:
    if _HIDDEN_LINK.match(inside):
        return ""
    return inside.rpartition("|")[2]
