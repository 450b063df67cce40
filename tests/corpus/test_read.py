"""Reading: sizes add up to the bytes, damage stays where it is, encodings are told right."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from camelid.corpus.decode import decode
from camelid.corpus.document import Document
from camelid.corpus.read import find_files, read, spans
from camelid.corpus.wiki import plain
from camelid.errors import InputError


def outcomes(path: Path) -> Counter[str]:
    return Counter(d.fault or d.skip or d.kind for d in read(path))


def lines(count: int) -> bytes:
    return b"".join(json.dumps({"text": f"record {n} " + "x" * 50}).encode() + b"\n" for n in range(count))


HTML = b"200 OK\r\nContent-Type: text/html"


def record(uri: str, body: bytes, length: int | None = None, head: bytes = HTML) -> bytes:
    http = b"HTTP/1.1 " + head + b"\r\n\r\n" + body
    head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {uri}\r\nContent-Type: application/http\r\n"
    return f"{head}Content-Length: {len(http) if length is None else length}\r\n\r\n".encode() + http + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_sizes_add_up(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(lines(500)))
    found = list(read(path))
    assert len(found) == 500
    assert sum(d.size for d in found) == len(lines(500))


def test_zstd(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "a.jsonl.zst"
    with pa.CompressedOutputStream(str(path), "zstd") as out:
        out.write(lines(300))
    assert outcomes(path) == {"text": 300}


def test_a_broken_gzip_member_costs_no_neighbour(tmp_path: Path) -> None:
    members = [gzip.compress(record(f"http://x/{n}", b"<p>page</p>")) for n in range(3)]
    damaged = bytearray(members[1])
    damaged[len(damaged) // 2] ^= 0xFF
    path = tmp_path / "a.warc.gz"
    path.write_bytes(members[0] + bytes(damaged) + members[2])
    assert outcomes(path) == {"html": 2, "broken_gzip_member": 1}
    path.write_bytes(members[0] + members[1][:-20])
    assert outcomes(path) == {"html": 1, "broken_gzip_member": 1}


@pytest.mark.parametrize("length", [10, 4000, -1])
def test_a_wrong_content_length_costs_no_neighbour(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.warc"
    good = [record(f"http://x/{n}", b"<p>page</p>") for n in range(2)]
    path.write_bytes(good[0] + record("http://x/bad", b"<p>bad</p>", length) + good[1])
    assert outcomes(path) == {"html": 2, "bad_content_length": 1}
    assert sum(d.size for d in read(path)) == path.stat().st_size


def test_odd_numbers_and_names_in_an_archive(tmp_path: Path) -> None:
    """Each costs its own record: a length of 5,000 digits, a status of a raised digit, a charset with a zero in it, a
    chunk of less than nothing."""
    good = record("http://x/good", b"<p>page</p>")
    endless = good.replace(b"Content-Length: ", b"Content-Length: " + b"0" * 5000)
    raised = record("http://x/r", b"<p>page</p>", head=b"\xb2 OK")
    charset = record("http://x/c", b"<p>caf\xe9</p>", head=b"200 OK\r\nContent-Type: text/html;charset=ab\0c")
    chunked = record("http://x/n", b"-5\r\n<p>page</p>", head=b"200 OK\r\nTransfer-Encoding: chunked")
    path = tmp_path / "a.warc"
    path.write_bytes(good + endless + raised + charset + chunked + good)
    found = list(read(path))
    assert sum(d.size for d in found) == path.stat().st_size
    outcome = {d.source.split("/")[-1]: d.fault or d.skip or d.text for d in found if "http" in d.source}
    assert outcome["r"] == "bad_http_response"
    assert "caf" in outcome["c"]
    assert "page" in outcome["n"]
    assert sum("/good" in d.source and "page" in d.text for d in found) == 2


def test_json_lines_with_every_kind_of_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = [b"{", b"[" * 100_000, b'{"text": "a\x00b"}', b'{"text": 1}', b"\xff\xfe\x00{", b'{"text": "cut']
    path.write_bytes(b"\xef\xbb\xbf" + lines(1) + b"\n".join(bad) + b"\n" + b'{"text": "\\ud800 lone"}\n' + lines(1))
    found = list(read(path))
    assert sum(d.size for d in found) == path.stat().st_size
    assert [d.text for d in found if not d.fault and not d.skip] == [
        "record 0 " + "x" * 50,
        "\ufffd lone",
        "record 0 " + "x" * 50,
    ]


@pytest.mark.parametrize("damaged", [b"2,%s", b'2,"a\n%s\nb"', b"%s"])
def test_a_table_with_a_line_that_is_no_text(tmp_path: Path, damaged: bytes) -> None:
    row = damaged % (b"\x00\x01\x02\xff\x00\x07" * 40)
    (tmp_path / "t.csv").write_bytes(b"id,text\n1,one\n" + row + b"\n3,three\n")
    found = list(read(tmp_path / "t.csv"))
    assert [d.text or d.fault or d.skip for d in found] == ["header", "one", "bad_csv", "three"]
    assert sum(d.size for d in found) == (tmp_path / "t.csv").stat().st_size


@pytest.mark.parametrize("encoding", ["gb18030", "cp1252"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_lines_are_in_the_encoding_of_their_file(tmp_path: Path, encoding: str, suffix: str) -> None:
    """Which of one short line nobody could tell."""
    texts = {
        "gb18030": ["道可道，非常道。", "谢谢", "名可名，非常名。", "你好", "天地不仁，以万物为刍狗。", "上善若水。"],
        "cp1252": ["El niño comió una manzana.", "Ein schöner Tag für Müller", "Ça va très bien.", "Größe"],
    }[encoding]
    mark = "\t" if suffix == ".tsv" else ","
    rows = [f"id{mark}text", *(f"{n}{mark}{text}" for n, text in enumerate(texts))]
    if suffix == ".jsonl":
        rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / f"t{suffix}").write_bytes(("\n".join(rows) + "\n").encode(encoding))
    assert [d.text for d in read(tmp_path / f"t{suffix}") if not d.skip] == texts


def test_tables_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text('Id\tBody\n1\t"Hello, he said\n2\tplain\n3\tends" here\n')
    found = list(read(tmp_path / "t.tsv", "Body"))
    assert [d.text for d in found[1:]] == ['"Hello, he said', "plain", 'ends" here']


def test_tables_of_tabs_that_are_quoted(tmp_path: Path) -> None:
    """By Python's csv, or pandas: the quotes are told by what stands in the file."""
    texts = ['line one "quoted"\nline two', "plain", 'all "quoted"', "a\ttab"]
    for some in (texts, texts[:2], texts[2:3], texts[1:2]):
        with (tmp_path / "t.tsv").open("w", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([["id", "text"], *([n, text] for n, text in enumerate(some))])
        assert [d.text for d in read(tmp_path / "t.tsv") if not d.skip] == some
        assert sum(d.size for d in read(tmp_path / "t.tsv")) == (tmp_path / "t.tsv").stat().st_size


def test_a_first_line_that_is_longer_than_what_is_looked_at(tmp_path: Path) -> None:
    korean = json.dumps({"text": "한국어 문장입니다. " * 6000}, ensure_ascii=False).encode()
    other = json.dumps({"text": "다른 인코딩의 줄"}, ensure_ascii=False).encode("cp949")
    (tmp_path / "a.jsonl").write_bytes(korean + b"\n" + other + b"\n")
    assert [d.text for d in read(tmp_path / "a.jsonl")][1] == "다른 인코딩의 줄"


def test_json_by_what_it_holds(tmp_path: Path) -> None:
    """Lines in a .json file, as C4's are named; an array or an object over lines in a file that says nothing."""
    (tmp_path / "c4.json").write_text('{"text": "one"}\n{"text": "two"}\nbroken\n')
    (tmp_path / "array").write_text('[\n {"text": "one"},\n {"text": "two"}\n]\n')
    (tmp_path / "object").write_text('{\n "text": "one"\n}\n')
    (tmp_path / "lines").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "notes").write_text("[1] A reference.\n")
    (tmp_path / "said").write_text('["Hello," he said, and left.\n')
    two = ["one", "two"]
    wanted = {"c4.json": [*two, "bad_json"], "array": two, "object": ["one"], "lines": two}
    wanted["notes"], wanted["said"] = ["[1] A reference.\n"], ['["Hello," he said, and left.\n']
    for name, texts in wanted.items():
        found = list(read(tmp_path / name))
        assert [d.fault or d.text for d in found] == texts
        assert sum(d.size for d in found) == (tmp_path / name).stat().st_size


def test_lines_in_a_json_file_that_is_too_long_to_be_one_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("camelid.corpus.records.MAX_RECORD_BYTES", 2000)
    (tmp_path / "c4.json").write_bytes(lines(200))
    assert outcomes(tmp_path / "c4.json") == {"text": 200}
    assert sum(d.size for d in read(tmp_path / "c4.json")) == len(lines(200))
    (tmp_path / "array.json").write_bytes(b"[" + lines(200).replace(b"\n", b",\n") + b"{}]")
    assert outcomes(tmp_path / "array.json") == {"too_long": 1}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-32-be"])
def test_wide_encodings(tmp_path: Path, encoding: str) -> None:
    """They are not cut at a newline byte, and UTF-32's mark is not taken for UTF-16's."""
    text = "A line of text, 中文的文字。\n" * 5000
    (tmp_path / "a.txt").write_bytes(("\ufeff" * (encoding == "utf-32-be") + text).encode(encoding))
    assert len(spans(tmp_path / "a.txt", 20_000)) == 1
    assert "".join(d.text for d in read(tmp_path / "a.txt")) == text


def test_an_empty_field_beside_one_that_holds_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "", "content": "here"}\n{"text": ""}\n{"text": null}\n'
                                       '{"text": "", "content": {"a": 1}}\n')  # fmt: skip
    assert [d.fault or d.text for d in read(tmp_path / "a.jsonl")] == ["here", "", "no_text_field", ""]


def test_parquet_with_a_string_that_is_not_utf8(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 4, 8, 10)))
    column = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"good\x00\xff\x00\x07ok"))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert [d.fault or d.text for d in read(tmp_path / "a.parquet")] == ["good", "binary", "ok"]
    pq.write_table(pa.table({"text": [b"good text", "café, naïve".encode()]}), tmp_path / "b.parquet")
    assert [d.fault or d.text for d in read(tmp_path / "b.parquet")] == ["good text", "café, naïve"]


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("a")
    (tmp_path / "data" / ".hidden").mkdir(parents=True)
    (tmp_path / "data" / ".hidden" / "b.txt").write_text("b")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    assert find_files([tmp_path / "data"]) == [tmp_path / "data" / "linked" / "a.txt"]
    assert find_files([tmp_path / "elsewhere", tmp_path / "data"]) == [tmp_path / "elsewhere" / "a.txt"]
    with pytest.raises(InputError, match="is no pattern of files"):
        find_files([f"{tmp_path}/**.txt"])


def test_a_cut_zstd_file_keeps_its_beginning(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    words = random.Random(0).randbytes(300_000).hex().encode()
    whole = bytes(pa.compress(words, "zstd", asbytes=True))
    (tmp_path / "a.txt.zst").write_bytes(whole[: len(whole) * 3 // 4])
    found = list(read(tmp_path / "a.txt.zst"))
    assert [d.fault for d in found if d.fault] == ["broken_zstd_frame"]
    assert len("".join(d.text for d in found if not d.fault)) > len(words) // 2


def test_a_line_longer_than_a_record_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("camelid.corpus.bytestream.MAX_RECORD_BYTES", 1 << 20)
    monkeypatch.setattr("camelid.corpus.bytestream.Stream.line.__defaults__", (1 << 20,))
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(1) + b'{"text": "' + b"y" * (3 << 20) + b'"}\n' + lines(1))
    assert outcomes(path) == {"text": 2, "line_too_long": 1}
    assert sum(d.size for d in read(path)) == path.stat().st_size


def test_a_decompression_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("camelid.corpus.bytestream.BOMB_BYTES", 4 << 20)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"0" * (64 << 20)))
    assert "decompression_bomb" in outcomes(path)


def test_spans_share_out_every_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(2000))
    whole = [d.text for d in read(path)]
    for size in (1000, 7777, 40_000):
        parts = spans(path, size)
        assert len(parts) > 1
        assert [d.text for p in parts for d in read(path, "auto", p.start, p.end)] == whole


ENCODED = {
    "gb18030": "骆驼在沙漠里走，白天热，夜里冷。他们说水在很远的地方。",
    "big5": "駱駝在沙漠裡走，白天熱，夜裡冷。他們說水在很遠的地方。",
    "shift_jis": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "euc_jp": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "iso2022_jp": "吾輩は猫である。名前はまだ無い。 I am a cat. どこで生れたかとんと見当がつかぬ。",
    "euc_kr": "오늘은 날씨가 매우 좋습니다. 우리는 학교에 갑니다. 나는 책을 읽고 있습니다.",
    "cp1251": "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.",
    "koi8_r": "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.",
    "cp1252": "Longtemps, je me suis couché de bonne heure. Mes yeux se fermaient vite, à peine ma bougie éteinte.",
    "utf-16-le": "Plain words in two bytes each, without a mark in front.",
    "utf-16": "With a mark in front: ünïcode.",
    "utf-8-sig": "A byte order mark before ünïcode.", "utf-32": "Four bytes a character.",
}  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODED)
def test_encodings_are_told_by_their_bytes(encoding: str) -> None:
    text = "\n".join([ENCODED[encoding]] * 4)
    assert decode(text.encode(encoding)) == text


def test_a_wrong_declaration_is_not_believed_and_mixed_lines_are_read() -> None:
    assert decode("naïve café".encode(), "shift_jis") == "naïve café"
    mixed = "\n".join(["ünïcode líne"] * 8).encode() + b"\n" + ENCODED["cp1252"].encode("cp1252")
    assert decode(mixed).splitlines()[-1] == ENCODED["cp1252"]


def test_names_that_lie(tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_bytes(record("http://x/", b"<p>page</p>"))
    (tmp_path / "plain.gz").write_text("not compressed at all")
    assert outcomes(tmp_path / "page.txt") == {"html": 1}
    (tmp_path / "pages.txt").write_bytes(record("http://x/", b"<p>page</p>\n" * 50) * 20)
    assert len(spans(tmp_path / "pages.txt", 1000)) == 1  # not cut amid a record
    assert outcomes(tmp_path / "plain.gz") == {"text": 1}
    assert len(find_files([tmp_path])) == 2  # .gz alone says no format; in a folder it is left alone


def test_real_archives_add_up(data: Path) -> None:
    for path in (data / "web" / "warc").rglob("*.warc.gz"):
        assert sum(d.size for d in read(path)) == len(gzip.decompress(path.read_bytes()))


def test_a_heading_that_is_none_takes_no_time() -> None:
    for line in ("=" + " " * 50_000 + "x", "= " * 25_000 + "x", "=" * 50_000 + "x"):
        assert "more" in plain(f"text\n{line}\nmore")
    assert plain("a\n== One ==\nb\n=== 1 = 1 ===  \nc") == "a\nOne\nb\n1 = 1\nc"


def test_wiki_markup() -> None:
    text = (
        "'''Bold''' [[Link|words]] and [[plain]].{{Infobox|a={{b|[[c]]}}}}<ref name=x>note</ref><!-- no -->\n"
        "{| class=x\n|-\n| cell\n|}\n== History ==\n* [http://x.y site] [[File:a.jpg|thumb|caption [[in]]]]\n"
        "== See also ==\n* [[Other]]\n"
    )
    assert plain(text).split("\n") == ["Bold words and plain.", "", "History", "site"]
    assert plain("In [[CSI: Miami]] and [[Art: A History|a book]][[de:Kamel]].") == "In CSI: Miami and a book."
    assert plain("Born {{birth date|1990|1|}} in {{a|{{b|}}|}}Rome.{{c|\n{|\n|x\n|}}}") == "Born  in Rome."


def test_every_document_names_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(2))
    assert [d.source for d in read(path)] == [f"{path}:1", f"{path}:2"]
    path.write_bytes(lines(200))
    named = [d.source for p in spans(path, 5000) for d in read(path, "auto", p.start, p.end)]
    assert len(set(named)) == 200
    packed = [gzip.compress(record(f"http://x/{n}", b"<p>page</p>")) for n in range(3)]
    broken = tmp_path / "a.jsonl.gz"
    broken.write_bytes(gzip.compress(lines(2)) + packed[1][:60] + gzip.compress(lines(2)))
    named = [d.source for d in read(broken)]
    assert len(set(named)) == len(named) == 5
    assert isinstance(next(read(path)), Document)
