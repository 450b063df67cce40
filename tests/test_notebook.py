"""What a notebook's cells show."""

from __future__ import annotations

import html
import math
import re
from pathlib import Path

import pytest

from camelid.errors import InputError
from camelid.generate.engine import Engine, Result
from camelid.generate.sampling import SamplingParams, TokenLogprob
from camelid.notebook import show_model, show_probabilities, show_run, show_tokens
from camelid.report.page import Page
from camelid.tokenizer.load import from_folder
from camelid.tokenizer.tokenizer import Tokenizer

from .conftest import tiny_model


def test_every_token_once_and_every_letter(tokenizer: Tokenizer) -> None:
    text = "The meaning of 骆驼 <b> & life\nis"
    page = show_tokens(tokenizer, text)
    inside = re.search(r"<pre>(.*)</pre>", page.parts[-1], re.S)
    assert inside
    assert html.unescape(re.sub(r"<[^>]+>", "", inside[1])).replace("↵", "") == text
    told = [int(n) for label in re.findall(r'title="([^"]*)"', inside[1]) for n in re.findall(r"(?:^| )(\d+): ", label)]
    assert told == tokenizer.encode(text, add_special_tokens=False, parse_special=False)


def test_probabilities_are_those_of_the_engine(chat_tokenizer: Tokenizer) -> None:
    engine = Engine(tiny_model(chat_tokenizer), chat_tokenizer)
    [result] = engine.generate(["The meaning"], SamplingParams(max_new_tokens=12, seed=0, logprobs=3))
    assert result.logprobs
    page = show_probabilities(chat_tokenizer, result)
    mean = -sum(found.logprob for found in result.logprobs) / len(result.logprobs)
    assert f"perplexity {math.exp(mean):.2f}" in page.title
    with pytest.raises(InputError, match="logprobs=5"):
        show_probabilities(chat_tokenizer, Result([1], "x", "eos", 1))


def test_a_sure_token_is_not_red_and_an_unsure_one_is(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The meaning", add_special_tokens=False)
    logs = [TokenLogprob(i, -0.01 if n == 0 else -9.0, ((i, -0.01),)) for n, i in enumerate(ids)]
    marks = re.findall(r'class="h(\d)"', show_probabilities(tokenizer, Result(ids, "", "eos", 1, logs)).parts[-1])
    assert marks[0] == "0"
    assert set(marks[1:]) == {"7"}


def test_a_models_parts_add_up(chat_tokenizer: Tokenizer) -> None:
    model = tiny_model(chat_tokenizer)
    bars = show_model(model).parts[-1]
    counts = [int(n.replace(",", "")) for n in re.findall(r"<td class=n>([\d,]+)</td>", bars)]
    assert sum(counts) == model.num_parameters()


def test_a_runs_losses(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": null}', '{"step": 2, "held_out": {"loss": 2.5, "x": 1}}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    page = show_run(tmp_path)
    assert "<polyline" in page.html() or "<circle" in page.html()
    with pytest.raises(InputError, match="is missing"):
        show_run(tmp_path / "nothing")


def test_a_page_in_a_frame_is_the_page() -> None:
    page = Page('A "title" & more')
    page.text("<script>alert(1)</script>")
    found = re.search(r'srcdoc="([^"]*)"', page._repr_html_())
    assert found
    assert html.unescape(found[1]) == page.html()
    assert "<script>alert" not in page.html()


def test_letters_of_several_tokens_are_shown_once(tokenizers: dict[str, Path]) -> None:
    """SentencePiece spells an unknown letter in bytes: the letter belongs to the token that ends it."""
    words = from_folder(tokenizers["sentencepiece"])
    ids = words.encode("The 骆驼 x", add_special_tokens=False)
    logs = [TokenLogprob(i, -1.0, ((i, -1.0),)) for i in ids]
    inside = re.search(r"<pre>(.*)</pre>", show_probabilities(words, Result(ids, "", "eos", 1, logs)).parts[-1], re.S)
    assert inside
    assert html.unescape(re.sub(r"<[^>]+>", "", inside[1])) == words.decode(ids)
