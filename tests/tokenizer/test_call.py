"""A tokenizer called as transformers' are: padded, cut, as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from camelid.errors import InputError
from camelid.tokenizer.load import from_folder
from camelid.tokenizer.tokenizer import Tokenizer

from ..conftest import TEXT


def test_a_call_is_what_generate_takes(each: Tokenizer) -> None:
    """As transformers has it: padded at the left, a mask that says where."""
    texts = ["a", "Some more words, 骆驼"]
    ids = [each.encode(text) for text in texts]
    assert each(texts[1]) == {"input_ids": ids[1], "attention_mask": [1] * len(ids[1])}
    assert each(texts)["input_ids"] == ids
    both = each(texts, return_tensors="pt", padding=True)
    short = len(ids[1]) - len(ids[0])
    assert both["attention_mask"].tolist() == [[0] * short + [1] * len(ids[0]), [1] * len(ids[1])]
    assert both["input_ids"][0, short:].tolist() == ids[0]
    assert both["input_ids"][1].tolist() == ids[1]
    plain = each.encode(texts[1], add_special_tokens=False)
    assert each(texts[1], return_tensors="pt", add_special_tokens=False)["input_ids"].tolist() == [plain]
    with pytest.raises(InputError, match="padding=True"):
        each(texts, return_tensors="pt")
    unknown: Any = {"stride": 4}
    with pytest.raises(TypeError, match="stride"):
        each(texts, **unknown)


def test_a_text_is_cut_when_it_is_said_and_as_transformers_cuts(tokenizers: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    for folder in tokenizers.values():
        ours, theirs = from_folder(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        for length in (1, 2, 5, 500):
            found = ours(TEXT[0], truncation=True, max_length=length)["input_ids"]
            assert found == theirs(TEXT[0], truncation=True, max_length=length)["input_ids"]
            assert len(found) <= length
        assert ours.encode(TEXT[0]) == theirs.encode(TEXT[0])  # the next text is whole again
    only: list[dict[str, Any]] = [{"truncation": True}, {"max_length": 4}, {"truncation": True, "max_length": 0},
                                  {"truncation": True, "max_length": 4.0}]  # fmt: skip
    for said in only:
        with pytest.raises(InputError, match="truncation=True and max_length"):
            ours("a", **said)
