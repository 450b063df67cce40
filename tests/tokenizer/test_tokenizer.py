"""Tokenizers against sentencepiece, llama.cpp's vectors and transformers; control tokens; templates."""

from __future__ import annotations

import json
import shutil
import struct
import threading
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camelid.errors import FormatError, InputError
from camelid.tokenizer import sentencepiece_model as spm
from camelid.tokenizer.load import from_folder, from_sentencepiece
from camelid.tokenizer.template import Guard, render
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokenizer.train import train

from ..conftest import TEXT

TEXTS = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0▁"), max_size=40)


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


def test_pieces_of_one_score_are_told(
    tokenizers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merges have no equals: what sentencepiece would cut otherwise is said, as here where it goes from the left."""
    sentencepiece = pytest.importorskip("sentencepiece")
    whole = (tokenizers["sentencepiece"] / "tokenizer.model").read_bytes()
    from_sentencepiece(tokenizers["sentencepiece"] / "tokenizer.model")
    assert not capsys.readouterr().err
    for text in ("ζ", "η", "θ", "ηθ", "ζη"):
        piece = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15" + struct.pack("<f", 0.0)
        whole += b"\x0a" + bytes([len(piece)]) + piece
    merged = tmp_path / "tokenizer.model"
    merged.write_bytes(whole)
    ours = from_sentencepiece(merged)
    assert "2 pieces share a score with another" in capsys.readouterr().err
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(merged)).encode("ζηθ", out_type=str)
    assert theirs[-2:] == ["ζη", "θ"]
    assert [ours.token(i) for i in ours.encode("ζηθ", add_special_tokens=False)][-2:] == ["ζ", "ηθ"]


def test_every_text_comes_back(each: Tokenizer) -> None:
    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def round_trip(text: str) -> None:
        assert each.decode(each.encode(text, add_special_tokens=False, parse_special=False)) == text

    round_trip()


def test_other_threads_go_on_while_a_long_text_is_cut(each: Tokenizer) -> None:
    """A server's loop among them."""
    steps, ended = [], threading.Event()

    def count() -> None:
        while not ended.wait(0.001):
            steps.append(None)

    counting = threading.Thread(target=count)
    counting.start()
    before = len(steps)
    each.encode("a word and another, " * 50_000)
    during = len(steps) - before
    ended.set()
    counting.join()
    assert during > 10


def test_offsets_point_at_the_text(each: Tokenizer) -> None:
    text = "naïve camels 骆驼 1234 😀"
    found = each.offsets(text)
    assert [i for i, _, _ in found] == each.encode(text, add_special_tokens=False, parse_special=False)
    assert found[-1][2] == len(text)
    for token_id, start, end in found:
        if (shown := each.decode([token_id])).isascii() and len(shown) > 1:
            assert shown.strip() == text[start:end].strip()


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


def test_what_a_message_spells_is_text(each: Tokenizer) -> None:
    """Control tokens written in a message give no control ids and come back letter for letter."""
    specials = set(each.special_tokens)
    honest = [i for i in each.apply_chat_template([{"role": "user", "content": "hi"}]) if i in specials]
    names = list(each.special_tokens.values())
    halves = [name[:cut] for name in names for cut in (2, len(name) - 1)] + [name[1:] for name in names]
    bits = st.sampled_from([*names, *halves, Guard.MARK, "<", "|", " ", "\n", "a", "ł"])

    @settings(max_examples=300, deadline=None)
    @given(st.lists(bits, max_size=8).map("".join))
    def hostile(content: str) -> None:
        messages = [{"role": "user", "content": content}]
        ids = each.apply_chat_template(messages)
        assert [i for i in ids if i in specials] == honest
        assert content.strip() in each.decode(ids)
        assert content in each.apply_chat_template(messages, tokenize=False)

    hostile()


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for p in messages[0]['content'] %}{{ p['text'] }}{% endfor %}",
        "{{ bos_token }}{% for p in messages[0]['content'] %}{{ p['text'] | lower }}{% endfor %}",
        "{{ bos_token }}{{ messages[0]['content'] | map(attribute='text') | join }}",
    ],
)
def test_parts_do_not_join_to_a_control_token(each: Tokenizer, template: str) -> None:
    each.chat_template = template
    for name in each.special_tokens.values():
        for cut in range(len(name) + 1):
            for spelled in (name, name.upper()):
                parts = [{"type": "text", "text": t} for t in ("a" + spelled[:cut], spelled[cut:] + "b")]
                ids = each.apply_chat_template([{"role": "user", "content": parts}])
                assert [i for i in ids if i in each.special_tokens] == [each.bos_token_id], (name, cut)


def test_a_pipeline_that_prefixes_the_first_word_only(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """The newer form of Llama 2's tokenizer.json: the text after a control token goes on."""

    def change(whole: dict[str, Any]) -> None:
        whole["normalizer"] = None
        whole["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False
        }  # fmt: skip

    tokenizer = from_folder(edited(tokenizers["sentencepiece"], tmp_path, change))
    tokenizer.bos_token_id = 1
    tokenizer.chat_template = "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"
    messages = [{"role": "user", "content": "hi there"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.apply_chat_template(messages) == tokenizer.encode(text, add_special_tokens=False)


def test_an_honest_conversation_is_encoded_as_its_text(each: Tokenizer) -> None:
    messages = [{"role": "user", "content": "What is 3 + 4?\n"}, {"role": "assistant", "content": " 7, of course"}]
    text = each.apply_chat_template(messages, tokenize=False)
    assert each.apply_chat_template(messages) == each.encode(text, add_special_tokens=False)


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


def edited(folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a tokenizer folder with its tokenizer.json changed."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    change(whole)
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"]["merges"].append(["zz", "qq"]), r"tokenizer\.json"),
        (lambda t: t["model"]["vocab"].update({"hole": 5000}), "no token has id"),
        (lambda t: t["model"]["vocab"].update({"twin": 300}), "stands for two tokens"),
        (lambda t: t["model"].update(type="Sorcery"), r"tokenizer\.json"),
    ],
)
def test_a_broken_vocabulary_is_refused(
    tokenizers: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        from_folder(edited(tokenizers["byte-level"], tmp_path, change))


def test_a_file_that_asks_for_truncation_cuts_nothing(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    asked = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    tokenizer = from_folder(edited(tokenizers["byte-level"], tmp_path, lambda t: t.update(truncation=asked)))
    assert tokenizer.decode(tokenizer.encode(TEXT[0], add_special_tokens=False)) == TEXT[0]


def test_what_the_config_says_of_a_tokenizer_model(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(tokenizers["sentencepiece"] / "tokenizer.model", tmp_path)
    said: dict[str, Any] = {"chat_template": [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]}
    for said["pad_token"], pad in (("<unk>", 0), ("", None)):
        for said["add_bos_token"] in (True, False):
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(said | {"bos_token": ""}))
            found = from_folder(tmp_path)
            assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 2, pad)
            assert (found.encode("a")[0] == 1) == said["add_bos_token"]
            assert found.chat_template == "b"
    (tmp_path / "tokenizer.model").write_bytes(b"".join(b"%s %d\n" % (b64encode(bytes([n])), n) for n in range(256)))
    assert from_folder(tmp_path).encode("a") == [97]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eot_id|>"}))
    found = from_folder(tmp_path)
    assert found.encode("a") == [256, 97]
    assert found.token(found.eos_token_id or 0) == "<|eot_id|>"
    (tmp_path / "tokenizer_config.json").unlink()
    found = from_folder(tmp_path)
    assert [found.token(i or 0) for i in (found.bos_token_id, found.eos_token_id, found.pad_token_id)] == [
        "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>",
    ]  # fmt: skip


def test_a_regular_expression_that_backtracks_ends(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    def change(whole: dict[str, Any]) -> None:
        whole["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "(a+)+$"}

    tokenizer = from_folder(edited(tokenizers["byte-level"], tmp_path, change))
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(FormatError, match="regular expression"):
            encode("a" * 5000 + "!")


def test_half_a_surrogate_pair_is_told(each: Tokenizer) -> None:
    for encode in (each.encode, lambda text: each.encode_batch([text]), each._encode_batch_reference):
        with pytest.raises(InputError, match="not valid Unicode"):
            encode("broken \ud83d" if encode != each._encode_batch_reference else ["broken \ud83d"])


def test_a_coverage_that_a_byte_level_tokenizer_has_no_use_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is for --kind sentencepiece"):
        train(lambda: ["text"], tmp_path / "out", 400, "byte-level", character_coverage=0.99)


def test_too_small_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 272"):
        train(lambda: TEXT, tmp_path / "t", 100, "byte-level")
    assert not list(tmp_path.iterdir())


def test_ids_outside_the_vocabulary(each: Tokenizer) -> None:
    with pytest.raises(InputError, match="outside the vocabulary"):
        each.decode([10**6])


def test_rare_characters_become_bytes(tmp_path: Path) -> None:
    """Of a thousand characters that occur once each, few get a piece when 99 % of the text is covered."""
    rare = "".join(chr(0x4E00 + n) for n in range(1000))
    texts = ["the camel walks through the desert " * 3000, rare]
    with pytest.raises(InputError, match=r"too small .*--character-coverage 0\.999"):
        train(lambda: texts, tmp_path / "all", 320, "sentencepiece", character_coverage=1.0)
    train(lambda: texts, tmp_path / "some", 320, "sentencepiece", character_coverage=0.99)
    cut = from_folder(tmp_path / "some")
    assert cut.decode(cut.encode(rare, add_special_tokens=False)) == rare
    assert len(cut.encode(rare)) > 2000
    with pytest.raises(InputError, match=r"--character-coverage 1\.1"):
        train(lambda: texts, tmp_path / "none", 320, "sentencepiece", character_coverage=1.1)
