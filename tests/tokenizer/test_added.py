"""What older folders say beside a `tokenizer.model` or `tokenizer.json`: tokens that were added, and the ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from camelid.errors import FormatError, InputError
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
    for odd in ([1], {"9" * 5000: {"content": "<a>"}}):
        with pytest.raises(FormatError, match="added tokens cannot be read"):
            from_folder(beside(folder, {"tokenizer_config.json": {"added_tokens_decoder": odd}}))
        (folder / "tokenizer_config.json").unlink()


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


def test_a_token_that_a_json_has_and_the_embedding_no_row_for_is_none(
    tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    """As Llama 2's own folder came out, and many a fine-tuning's."""
    folder = shutil.copytree(tokenizers["sentencepiece"], tmp_path / "padded")
    size = len(from_folder(folder))
    described = json.loads((folder / "tokenizer.json").read_text())
    pad = {**described["added_tokens"][0], "content": "[PAD]", "id": size}
    described["added_tokens"].append(pad)
    beside(folder, {"tokenizer.json": described, "tokenizer_config.json": {"pad_token": "[PAD]", "bos_token": "<s>"}})
    assert (len(from_folder(folder)), from_folder(folder).pad_token_id) == (size + 1, size)
    beside(folder, {"config.json": {"vocab_size": size}})
    found = from_folder(folder)
    assert (len(found), found.pad_token_id, found.bos_token_id) == (size, None, 1)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}[PAD]")  # one that is needed stays: it is
    assert len(from_folder(folder)) == size + 1  # another model's tokenizer, as is found out
    with pytest.raises(InputError, match="do not belong together"):
        from_folder(folder).check_rows(size, folder)


def test_what_the_config_says_of_bos_counts_for_llamas_own_classes(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """transformers 4 makes these tokenizers' ends anew, whatever tokenizer.json has; a plain one's it leaves."""
    folder = shutil.copytree(tokenizers["byte-level"], tmp_path / "t")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    bos = from_folder(folder).bos_token_id
    for kind, adds, wanted in (("PreTrainedTokenizerFast", False, 1), ("LlamaTokenizerFast", False, 0),
                               ("LlamaTokenizerFast", True, 1), ("LlamaTokenizer", None, 1)):  # fmt: skip
        beside(folder, {"tokenizer_config.json": {**config, "tokenizer_class": kind, "add_bos_token": adds}})
        assert from_folder(folder).encode("words").count(bos) == wanted, kind


def test_where_config_and_file_differ_on_an_end_it_is_told(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tokenizers["sentencepiece"], tmp_path / "t")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    for words, ids, told in (
        ({}, [1], ""), ({"add_bos_token": True, "add_eos_token": False}, [1], ""),
        ({"add_eos_token": True}, [1, 2], "add_eos_token true, tokenizer.json does"),
        ({"add_bos_token": False, "add_eos_token": True}, [2], "add_bos_token false and add_eos_token true"),
    ):  # fmt: skip
        beside(folder, {"tokenizer_config.json": config | words})
        assert from_folder(folder).encode("") == ids, words
        err = capsys.readouterr().err
        assert told in err if told else not err
    described = json.loads((folder / "tokenizer.json").read_text())
    described["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    described["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    for words, ids in (({"add_bos_token": True}, [1, 2]), ({"add_eos_token": True}, [1, 2]), ({}, [1, 2])):
        beside(folder, {"tokenizer.json": described, "tokenizer_config.json": config | words})
        assert from_folder(folder).encode("") == ids  # as it lies in the file
        assert not capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    beside(folder, {"tokenizer_config.json": config | {"add_eos_token": True}})
    assert from_folder(folder).encode("") == [1, 2]


def test_one_token_at_both_ends(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tokenizers["byte-level"], tmp_path / "t")
    found = from_folder(folder)
    config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": found.token(found.bos_token_id or 0),
              "eos_token": found.token(found.bos_token_id or 0)}  # fmt: skip
    for words, wanted in (({}, [found.bos_token_id]), ({"add_bos_token": False}, [])):
        beside(folder, {"tokenizer_config.json": config | words})
        assert from_folder(folder).encode("") == wanted


def test_free_places_of_a_tokenizer_model_have_the_names_of_the_config(pieces: tuple[Path, int]) -> None:
    folder, size = pieces
    plain = from_folder(folder)
    one, two = size - 1, size - 2  # as a vocabulary's [UNUSED_TOKEN_146]
    decoder = {
        str(one): {"content": "<|im_start|>", "special": True}, str(two): {"content": "<|im_end|>", "special": True},
        "1": {"content": "<s>", "special": True}, str(size - 3): {"content": plain.token(size - 4), "special": False},
    }  # fmt: skip
    found = from_folder(
        beside(folder, {"tokenizer_config.json": {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>"}})
    )
    assert (len(found), found.eos_token_id, found.token(size - 3)) == (size, two, plain.token(size - 3))
    ids = found.encode(TURN, add_special_tokens=False)
    assert (ids[0], ids[-1]) == (one, two)
    assert found.special_tokens[one] == "<|im_start|>"


def test_a_prefix_that_the_config_takes_away(pieces: tuple[Path, int]) -> None:
    folder, _ = pieces
    for prefix in (True, False):
        found = from_folder(beside(folder, {"tokenizer_config.json": {"add_prefix_space": prefix}}))
        for text in ("words", " words", "骆驼"):
            ids = found.encode(text, add_special_tokens=False)
            assert "".join(map(found.token, ids)) == "▁" * prefix + text.replace(" ", "▁")
            assert found.decode(ids) == text


def test_transformers_cuts_added_tokens_of_a_saved_folder_alike(pieces: tuple[Path, int], tmp_path: Path) -> None:
    """Each flag counts: one that is left out stands for another there."""
    transformers = pytest.importorskip("transformers")
    folder, size = pieces
    decoder = {
        str(size): {"content": "<|im_start|>", "special": False},
        str(size + 1): {"content": "<|im_end|>", "special": True},
        str(size + 2): {"content": "<|end|>", "special": True, "rstrip": True},
    }  # fmt: skip
    ours = from_folder(beside(folder, {"tokenizer_config.json": {"added_tokens_decoder": decoder, "bos_token": "<s>"}}))
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in (TURN, f"a\n{TURN}<|end|>  b", "words<|im_start|>words"):
        assert theirs.encode(text) == ours.encode(text)


def test_the_sentencepiece_file_goes_along_while_it_is_true(pieces: tuple[Path, int], tmp_path: Path) -> None:
    """llama.cpp's converter takes scores from it; without them it would cut words otherwise."""
    folder, size = pieces
    given = (folder / "tokenizer.model").read_bytes()
    beside(folder, {"added_tokens.json": {"<|im_end|>": size}})
    for place in ("one", "two"):  # from the file alone, then from the folder that was saved
        (tmp_path / place).mkdir()
        from_folder(folder).save(tmp_path / place)
        folder = tmp_path / place
        assert (folder / "tokenizer.model").read_bytes() == given
        config = json.loads((folder / "tokenizer_config.json").read_text())
        flags = {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
        assert config["added_tokens_decoder"] == {str(size): {"content": "<|im_end|>", "special": False} | flags}
    described = json.loads((folder / "tokenizer.json").read_text())
    vocab = described["model"]["vocab"]
    one, other = (next(text for text, i in vocab.items() if i == size - n) for n in (1, 2))
    vocab[one], vocab[other] = vocab[other], vocab[one]
    beside(folder, {"tokenizer.json": described})
    (tmp_path / "three").mkdir()
    from_folder(folder).save(tmp_path / "three")
    assert not (tmp_path / "three" / "tokenizer.model").exists()
