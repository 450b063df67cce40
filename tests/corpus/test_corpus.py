"""The corpus: every document and byte accounted for, damage repaired, duplicates out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from camelid.corpus import build, documents
from camelid.corpus.filters import Limits, few_letters, repeated_lines
from camelid.corpus.read import html_text
from camelid.corpus.run import repair
from camelid.errors import InputError

LONG = "A sentence that is long enough to be kept by the filter, number {}."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.txt").write_text(LONG.format(1))
    (raw / "b.md").write_text(LONG.format(1) + "  \r\n")  # the same after repair
    (raw / "c.txt").write_text("short")
    (raw / "d.txt").write_bytes(b"\xff\xfe\xfa" * 40)
    (raw / "e.jsonl").write_text(json.dumps({"text": LONG.format(2)}) + '\n{"no": 1}\nnot json\n\n')
    (raw / "f.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": LONG.format(3)}).encode()))
    (raw / "g.jsonl.gz").write_bytes(b"\x1f\x8bbroken")
    (raw / "h.html").write_text(
        f"<html><head><title>no</title></head><script>no()</script><p>{LONG.format(4)}</p></html>"
    )
    return raw


def test_every_document_and_byte_is_accounted_for(folder: Path, tmp_path: Path) -> None:
    result = build([folder], tmp_path / "out", quiet=True)
    for tally in (result["documents"], result["bytes"]):
        assert tally["read"] == tally["kept"] + sum(tally["dropped"].values()) + sum(tally["quarantined"].values())
    assert result["documents"] == {
        "read": 10, "kept": 4, "dropped": {"duplicate": 1, "too_short": 1},
        "quarantined": {"not_utf8": 1, "no_text_field": 2, "damaged_gzip": 1},
    }  # fmt: skip
    assert list(documents(tmp_path / "out")) == [LONG.format(n) for n in (1, 2, 3, 4)]


def test_the_digest_is_of_the_text(folder: Path, tmp_path: Path) -> None:
    digests = [build([folder], tmp_path / name, quiet=True)["digest"] for name in "ab"]
    (folder / "a.txt").write_text(LONG.format(9))
    assert digests[0] == digests[1] != build([folder], tmp_path / "c", quiet=True)["digest"]


def test_parquet_comes_back(folder: Path, tmp_path: Path) -> None:
    first = build([folder], tmp_path / "one", quiet=True)
    second = build([tmp_path / "one" / "documents.parquet"], tmp_path / "two", quiet=True)
    assert first["digest"] == second["digest"]


def test_real_text(data: Path, tmp_path: Path) -> None:
    result = build([data / "corpora" / "c4_demo.jsonl", data / "corpora" / "zh"], tmp_path / "out", quiet=True)
    assert result["documents"]["kept"] >= 290
    assert "林黛玉" in "".join(documents(tmp_path / "out"))


def test_repair() -> None:
    assert repair("The cafÃ© is open\r\n\x00ok  ") == "The café is open\nok"
    assert repair("“quotes” stay, ﬁ too") == "“quotes” stay, ﬁ too"
    assert repair("e\u0301") == "é"


def test_filters() -> None:
    assert repeated_lines("buy now\n" * 10, Limits())
    assert not repeated_lines("one\ntwo\nthree", Limits())
    assert few_letters("12 34 56 | -- 78 == 9 0 a", Limits())
    assert not few_letters("骆驼在沙漠里走", Limits())


def test_html_keeps_what_a_reader_sees() -> None:
    page = "<nav>menu</nav><h1>Title</h1><p>One <b>bold</b> word</p><style>p{}</style><script>x<y</script>"
    assert html_text(page) == "Title\nOne bold word"


@pytest.mark.parametrize("name", ["missing", "missing/*.txt", "x.exe"])
def test_inputs_that_name_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.exe").touch()
    with pytest.raises(InputError, match=name.replace("*", r"\*").replace(".", r"\.")):
        build([tmp_path / name], tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_nothing_kept_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(InputError, match="too_short"):
        build([tmp_path / "a.txt"], tmp_path / "out", quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
