"""Extending: new text gets shorter, old ids and old scores stay."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
import torch

from camelid.corpus import build as build_corpus
from camelid.errors import InputError
from camelid.formats import hf
from camelid.formats.adapter import write_adapter
from camelid.formats.convert import convert
from camelid.formats.extend import extend as extend_model
from camelid.formats.load import load
from camelid.kernels import bpe
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.lora import LoraConfig
from camelid.quantize.job import Wish, quantize
from camelid.tokenizer.byte_level import learn
from camelid.tokenizer.extend import Extension, extend
from camelid.tokenizer.load import from_folder, from_sentencepiece
from camelid.tokenizer.native import character_to_byte, classes
from camelid.tokenizer.tokenizer import Tokenizer

from ..conftest import TEXT

pytestmark = pytest.mark.skipif(not bpe.ready(classes), reason="the native library is not built")

CHINESE = [
    "道可道，非常道。名可名，非常名。无名天地之始，有名万物之母。",
    "天地不仁，以万物为刍狗。",
    "上善若水。水善利万物而不争。",
] * 5
ASCII = [text for text in TEXT if text.isascii()] + ["  spaces\tand\nlines  ", "".join(map(chr, range(128)))]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    return ids


def spelled_out(ids: list[int], added: Extension) -> list[int]:
    """Ids with every new token replaced by what is said to have spelled it."""
    return [old for i in ids for old in (added.spelled[i - added.first] if i >= added.first else [i])]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_old_ids_stay_and_new_text_gets_shorter(tokenizers: dict[str, Path], tmp_path: Path, kind: str) -> None:
    before = from_folder(tokenizers[kind])
    added = extend(before, lambda: CHINESE, 60, tmp_path, tokenizers[kind])
    after = from_folder(tmp_path)
    assert len(after) == len(before) + len(added.names)
    assert [after.token(i) for i in range(len(before))] == [before.token(i) for i in range(len(before))]
    for text in ASCII:
        assert encode(after, text) == encode(before, text)
    for text in CHINESE:
        ids = encode(after, text)
        assert len(ids) < 0.7 * len(encode(before, text))
        assert max(ids) >= len(before)
        assert after.decode(ids) == text
        assert before.decode(spelled_out(ids, added)) == text


def test_a_sentencepiece_file_is_extended_too(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tokenizers["sentencepiece"]
    extend(from_folder(folder), lambda: CHINESE, 60, tmp_path, folder)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for ours in (from_folder(tmp_path), from_sentencepiece(tmp_path / "tokenizer.model")):
        assert theirs.get_piece_size() == len(ours)
        for text in [*CHINESE, *TEXT]:
            for line in filter(None, text.split("\n")):
                assert encode(ours, line) == theirs.encode(line)


def test_a_folder_whose_json_has_gone_its_own_way(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """A pad token in tokenizer.json that tokenizer.model does not know, as in many Llama 2 folders."""
    shutil.copytree(tokenizers["sentencepiece"], tmp_path / "padded")
    before = from_folder(tmp_path / "padded")
    before.backend.add_special_tokens(["<pad>"])
    before.backend.save(str(tmp_path / "padded" / "tokenizer.json"))
    before = from_folder(tmp_path / "padded")
    (tmp_path / "out").mkdir()
    added = extend(before, lambda: CHINESE, 40, tmp_path / "out", tmp_path / "padded")
    after = from_folder(tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    assert after.token(len(before) - 1) == "<pad>"
    assert [after.token(i) for i in range(len(before), len(after))] == added.names
    assert after.decode(encode(after, CHINESE[0])) == CHINESE[0]


def test_a_file_that_cuts_otherwise_is_not_extended(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """Without the blank in front that the model file asks for, as its config says."""
    folder = tmp_path / "from"
    folder.mkdir()
    shutil.copy(tokenizers["sentencepiece"] / "tokenizer.model", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": False, "add_eos_token": True}))
    before = from_folder(folder)
    (tmp_path / "to").mkdir()
    extend(before, lambda: CHINESE, 60, tmp_path / "to", folder)
    after = from_folder(tmp_path / "to")
    for text in ASCII:
        assert after.encode(text) == before.encode(text)
    assert not (tmp_path / "to" / "tokenizer.model").exists()


def test_a_tiktoken_vocabulary(tmp_path: Path) -> None:
    """Its control tokens stand behind the vocabulary, and stay where they are."""
    table = character_to_byte()
    learned = sorted(learn([*TEXT, *CHINESE], 330, []).get_vocab().items(), key=lambda item: item[1])
    rows = [f"{base64.b64encode(bytes(table[c] for c in token)).decode()} {rank}" for token, rank in learned]
    (tmp_path / "tokenizer.model").write_text("\n".join(rows))
    before = from_folder(tmp_path)
    (tmp_path / "out").mkdir()
    added = extend(before, lambda: CHINESE, 40, tmp_path / "out", tmp_path)
    after = from_folder(tmp_path / "out")
    assert after.special_tokens == before.special_tokens
    assert [after.token(i) for i in range(len(before), len(after))] == added.names
    for text in CHINESE:
        assert len(encode(after, text)) < len(encode(before, text))
        assert after.encode_documents([text]) == [encode(after, text)]
        assert before.decode(spelled_out(encode(after, text), added)) == text


def test_no_merge_is_learned_twice(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    extend(from_folder(tokenizers["byte-level"]), lambda: [*CHINESE, *TEXT], 80, tmp_path)
    merges = [tuple(m) for m in json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]]
    assert len(merges) == len(set(merges))


def test_text_that_teaches_nothing(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no token can be learned"):
        extend(from_folder(tokenizers["byte-level"]), lambda: ["plain text " * 20], 10, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_scores_old_tokens_as_before(
    tokenizers: dict[str, Path], tiny: LlamaConfig, tmp_path: Path, tied: bool
) -> None:
    from dataclasses import replace

    tokenizer = from_folder(tokenizers["byte-level"])
    torch.manual_seed(0)
    hf.save(Llama(replace(tiny, vocab_size=len(tokenizer), tie_word_embeddings=tied)), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    (tmp_path / "zh.txt").write_text("\n\n".join(CHINESE[:3]), encoding="utf-8")
    build_corpus([tmp_path / "zh.txt"], tmp_path / "corpus", quiet=True)
    result = extend_model(tmp_path / "model", tmp_path / "corpus", lambda: CHINESE, 30, tmp_path / "longer")
    old, new = load(tmp_path / "model"), load(tmp_path / "longer")
    ids = torch.tensor([tokenizer.encode("The meaning of life")])
    size = len(tokenizer)
    assert new.config.vocab_size == size + result["added"]
    assert torch.equal(new(ids).logits[..., :size], old(ids).logits)
    longer = from_folder(tmp_path / "longer")
    rows = [i for i in range(size, len(longer)) if "\ufffd" not in longer.decode([i])]
    spelled = [tokenizer.encode(longer.decode([i]), add_special_tokens=False) for i in rows]
    for row, parts in zip(rows, spelled, strict=True):
        torch.testing.assert_close(new.embed_tokens.weight[row], old.embed_tokens.weight[parts].mean(0))
    assert result["bytes_per_token"][1] > result["bytes_per_token"][0]
    convert(tmp_path / "model", tmp_path / "meta", "meta")
    extend_model(tmp_path / "meta", tmp_path / "corpus", lambda: CHINESE, 30, tmp_path / "longer-meta")
    assert torch.equal(load(tmp_path / "longer-meta")(ids).logits, new(ids).logits)
    hf.save(Llama(replace(tiny, vocab_size=len(tokenizer), intermediate_size=64)), tmp_path / "wide")
    tokenizer.save(tmp_path / "wide")
    quantize(tmp_path / "wide", tmp_path / "int8", Wish("int8"))
    with pytest.raises(InputError, match=r"is rounded \(.*\): extend the full-precision model"):
        extend_model(tmp_path / "int8", tmp_path / "corpus", lambda: CHINESE, 30, tmp_path / "none")
    (tmp_path / "adapter").mkdir()
    write_adapter(LoraConfig(), {}, tmp_path / "adapter", tmp_path / "model", {})
    tokenizer.save(tmp_path / "adapter")
    with pytest.raises(InputError, match="is an adapter: camelid merge"):
        extend_model(tmp_path / "adapter", tmp_path / "corpus", lambda: CHINESE, 30, tmp_path / "none")
