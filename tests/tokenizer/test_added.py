"""What older folders say beside a `tokenizer.model` or `tokenizer.json`: tokens that were added, and the ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from camelid.errors import FormatError
from camelid.tokenizer.load import from_folder

TURN = "<|im_start|>user\nwords<|im_end|>"


def beside(folder: Path, files: Mapping[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def pieces(tokenizers: dict[str, Path], tmp_path: Path) -> tuple[Path, int]:
    """A folder of a `tokenizer.model` alone, and how many pieces it has."""
    shutil.copy(tokenizers["sentencepiece"] / "tokenizer.model", tmp_path)
    return tmp_path, len(from_folder(tmp_path))


@pytest.mark.parametrize("newer", [False, True])
def test_tokens_that_were_added_to_a_tokenizer_model(pieces: tuple[Path, int], tmp_path: Path, newer: bool) -> None:
    folder, size = pieces
    ends = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}}
    first = {"content": "<s>", "special": True}
    added = {"content": "<|im_end|>", "special": True}, {"content": "<|im_start|>", "special": True}
    decoder = {"1": first, str(size): added[0], str(size + 1): added[1]}
    older = {
        "added_tokens.json": {"<|im_start|>": size + 1, "<|im_end|>": size},
        "special_tokens_map.json": ends | {"additional_special_tokens": ["<|im_start|>"]},
    }
    tokenizer = from_folder(
        beside(folder, {"tokenizer_config.json": ends | {"added_tokens_decoder": decoder}} if newer else older)
    )
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (size + 2, 1, size)
    ids = tokenizer.encode(TURN)
    assert (ids[0], ids[1], ids[-1]) == (1, size + 1, size)
    assert max(ids[2:-1]) < size
    assert tokenizer.special_tokens[size + 1] == "<|im_start|>"
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    again = from_folder(tmp_path / "saved")
    assert (again.encode(TURN), again.eos_token_id) == (ids, size)


def test_an_added_token_that_leaves_a_gap_is_refused(pieces: tuple[Path, int]) -> None:
    folder, size = pieces
    for wrong in ({"<a>": size + 1}, {"<a>": size, "<b>": size + 2}):
        with pytest.raises(FormatError, match=r"has id \d+, not \d+"):
            from_folder(beside(folder, {"added_tokens.json": wrong}))
    with pytest.raises(FormatError, match="added tokens cannot be read"):
        from_folder(beside(folder, {"added_tokens.json": {"<a>": "b"}}))


def test_a_token_that_the_embedding_has_no_row_for_is_none(pieces: tuple[Path, int]) -> None:
    """A pad that was added for training, and the model never made larger."""
    folder, size = pieces
    files = {"added_tokens.json": {"[PAD]": size}, "special_tokens_map.json": {"pad_token": "[PAD]"}}
    assert from_folder(beside(folder, files)).pad_token_id == size
    found = from_folder(beside(folder, {"config.json": {"vocab_size": size}}))
    assert (len(found), found.pad_token_id) == (size, None)


def test_the_ends_of_an_older_folder(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """What tokenizer_config.json leaves open, special_tokens_map.json says."""
    folder = shutil.copytree(tokenizers["byte-level"], tmp_path / "old")
    named = from_folder(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "", "eos_token": None}))
    assert from_folder(folder).eos_token_id is None
    ends = {f"{key}_token": named.token(i) for key, i in (("bos", named.bos_token_id), ("eos", named.eos_token_id))
            if i is not None}  # fmt: skip
    assert len(ends) == 2
    beside(folder, {"special_tokens_map.json": ends})
    found = from_folder(folder)
    assert (found.bos_token_id, found.eos_token_id) == (named.bos_token_id, named.eos_token_id)
