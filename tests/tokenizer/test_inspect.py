"""Figures of `tokenizer inspect` against what can be counted by hand, and the page."""

from __future__ import annotations

from pathlib import Path

from camelid.tokenizer.inspect import SAMPLES, inspect, read_counts, summary, write_page
from camelid.tokenizer.load import from_folder


def test_figures(tokenizers: dict[str, Path]) -> None:
    for folder in tokenizers.values():
        tokenizer = from_folder(folder)
        texts = ["one two three", "四五六", "seven"]
        found = inspect(tokenizer, texts, lambda text: "en" if text.isascii() else "zh")
        facts = summary(tokenizer, found, read_counts(folder))
        ids = [tokenizer.encode(t, add_special_tokens=False) for t in texts]
        english = facts["languages"]["en"]
        assert (english["documents"], english["bytes"]) == (2, 18)
        assert english["tokens"] == len(ids[0]) + len(ids[2])
        assert english["tokens_per_word"] == english["tokens"] / 4
        assert facts["languages"]["zh"]["tokens_per_character"] == len(ids[1]) / 3
        assert facts["languages"]["zh"]["coverage"] < 1 == english["coverage"]
        assert facts["round_trip"] == {"documents": 3, "returned": 3}
        rows = [line.rsplit("\t", 2) for line in (folder / "vocab.tsv").read_text().splitlines()[1:]]
        special = {str(i) for i in tokenizer.special_tokens}
        assert facts["unused"]["count"] == sum(count == "0" and i not in special for i, _, count in rows)


def test_a_text_that_does_not_come_back_is_told(tokenizers: dict[str, Path]) -> None:
    tokenizer = from_folder(tokenizers["sentencepiece"])
    found = inspect(tokenizer, ["good", "a▁b"], lambda _: "en")  # the file format's own blank
    assert (found.returned, found.unequal) == (1, "a▁b")


def test_the_page_shows_every_token(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    for folder in tokenizers.values():
        tokenizer = from_folder(folder)
        texts = list(SAMPLES.values())
        facts = summary(tokenizer, inspect(tokenizer, texts, lambda _: "all"), None)
        write_page(tmp_path / "page.html", tokenizer, facts, ["<b>naïve</b> 骆驼"])
        page = (tmp_path / "page.html").read_text()
        assert "<b>naïve" not in page
        assert page.count("<span class=") > 5
        assert "骆" in page
