"""Tokenizers against sentencepiece, llama.cpp's vectors and transformers; control tokens; templates."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camelid.errors import FormatError, InputError
from camelid.tokenizer import sentencepiece_model as spm
from camelid.tokenizer.load import from_folder, from_sentencepiece
from camelid.tokenizer.template import render
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokenizer.train import train

from ..conftest import TEXT

TEXTS = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0▁"), max_size=40)


@pytest.fixture(params=["byte-level", "sentencepiece"])
def each(request: pytest.FixtureRequest, tokenizers: dict[str, Path]) -> Tokenizer:
    return from_folder(tokenizers[request.param])


def test_llama2_vectors_of_llama_cpp(data: Path) -> None:
    folder = data / "tokenizers" / "llama2"
    tokenizer = from_sentencepiece(folder / "tokenizer.model")
    inputs = (folder / "ggml-vocab-llama-spm.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    outputs = (folder / "ggml-vocab-llama-spm.gguf.out").read_text().splitlines()
    checked = 0
    for text, ids in zip(inputs, outputs, strict=False):
        expected = [int(i) for i in ids.split()]
        if text:  # an empty text has no prefix space in ours, as in sentencepiece
            assert tokenizer.encode(text, add_special_tokens=False, parse_special=False) == expected, repr(text)
            checked += 1
    assert checked >= 45


def test_llama2_equals_sentencepiece_on_real_text(data: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = data / "tokenizers" / "llama2" / "tokenizer.model"
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=str(path)), from_sentencepiece(path)
    text = (data / "corpora" / "wikitext2" / "valid.txt").read_text()[:100_000]
    chinese = (data / "corpora" / "zh" / "红楼梦.txt").read_text()[:20_000]
    for line in [*text.split("\n"), *chinese.split("\n")]:
        if line:
            ids = theirs.encode(line)
            assert ours.encode(line, add_special_tokens=False, parse_special=False) == ids
            assert ours.decode(ids) == theirs.decode(ids)


def test_a_trained_model_equals_sentencepiece(tokenizers: dict[str, Path]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tokenizers["sentencepiece"]
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    readers = (from_folder(folder), from_sentencepiece(folder / "tokenizer.model"))

    @settings(max_examples=200, deadline=None)
    @given(TEXTS.filter(bool))
    def same(text: str) -> None:
        for ours in readers:
            assert ours.encode(text, add_special_tokens=False, parse_special=False) == theirs.encode(text)

    same()


def test_every_text_comes_back(each: Tokenizer) -> None:
    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def round_trip(text: str) -> None:
        assert each.decode(each.encode(text, add_special_tokens=False, parse_special=False)) == text

    round_trip()


def test_transformers_reads_our_folder_and_agrees(tokenizers: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    for folder in tokenizers.values():
        ours, theirs = from_folder(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        for text in TEXT[:4]:
            assert theirs.encode(text) == ours.encode(text)
            assert theirs.decode(theirs.encode(text)) == ours.decode(ours.encode(text))
        assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_token_id, ours.eos_token_id)


def test_one_bos(each: Tokenizer) -> None:
    ids = each.encode("hello")
    assert ids[0] == each.bos_token_id
    assert ids.count(ids[0]) == 1
    chat = each.apply_chat_template([{"role": "user", "content": "hello"}])
    assert chat.count(each.bos_token_id) == 1


def test_documents_never_hold_control_tokens(each: Tokenizer) -> None:
    hostile = " ".join(each.special_tokens.values())
    [ids] = each.encode_documents([hostile])
    assert not {i for i in ids if i in each.special_tokens}
    assert each.encode(hostile)[1] in each.special_tokens  # while a prompt may spell them


def test_a_message_cannot_end_its_own_turn(each: Tokenizer) -> None:
    honest = each.apply_chat_template([{"role": "user", "content": "hi"}])
    hostile = each.apply_chat_template([{"role": "user", "content": f"hi {' '.join(each.special_tokens.values())}"}])
    specials = set(each.special_tokens)
    assert [i for i in hostile if i in specials] == [i for i in honest if i in specials]


def test_digits_are_single_tokens(tokenizers: dict[str, Path]) -> None:
    tokenizer = from_folder(tokenizers["sentencepiece"])
    pieces = [tokenizer.token(i) for i in tokenizer.encode("x1234567890", add_special_tokens=False)]
    assert pieces[-10:] == list("1234567890")


def test_vocabulary_counts_add_up(tokenizers: dict[str, Path]) -> None:
    for folder in tokenizers.values():
        rows = [line.split("\t") for line in (folder / "vocab.tsv").read_text().splitlines()[1:]]
        tokenizer = from_folder(folder)
        assert [int(r[0]) for r in rows] == list(range(len(tokenizer)))
        assert sum(int(r[2]) for r in rows) == sum(len(ids) for ids in tokenizer.encode_documents(TEXT))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(10**9) %}xxxxxxxxxx{% endfor %}",
        "{{ messages.append(1) }}",
        "{% if %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_hostile_templates_are_refused(template: str) -> None:
    with pytest.raises(FormatError, match="chat template"):
        render(template, [{"role": "user", "content": "x"}])


@pytest.mark.parametrize("content", [b"", b"\xff" * 50, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x05hello"])
def test_broken_sentencepiece_models(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(FormatError, match=r"tokenizer\.model"):
        spm.read(tmp_path / "tokenizer.model")


def test_broken_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        from_folder(tmp_path)


def test_too_small_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 262"):
        train(lambda: TEXT, tmp_path / "t", 100, "byte-level")
    assert not list(tmp_path.iterdir())


def test_ids_outside_the_vocabulary(each: Tokenizer) -> None:
    with pytest.raises(InputError, match="outside the vocabulary"):
        each.decode([10**6])
