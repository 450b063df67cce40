"""Perplexity by definition; BLEU and ROUGE against published figures."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from camelid.errors import CamelidError, InputError
from camelid.evaluate import bleu, choice, perplexity, rouge
from camelid.evaluate.choice import Question
from camelid.evaluate.perplexity import BosRule, Cut, score, windows
from camelid.evaluate.texts import Text
from camelid.generate.cache import KVCache
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.tokenizer.tokenizer import Tokenizer


@given(st.integers(1, 200), st.integers(2, 40), st.data())
def test_windows_score_every_token_once(length: int, window: int, draw: st.DataObject) -> None:
    stride = draw.draw(st.integers(1, window))
    scored, read = [], []
    for start, end, first in windows(length, window, stride):
        assert 0 <= start < first < end <= length
        assert end - 1 - start <= window
        assert start == 0 or first - start > window - stride
        scored += range(first, end)
        read += range(start, end - 1)
    assert scored == list(range(1, length))
    if stride == window:
        assert read == list(range(length - 1))  # nothing is read twice


@pytest.mark.parametrize("bos", ["document", "window", "none"])
@pytest.mark.parametrize(("window", "stride"), [(64, 64), (16, 16), (16, 5)])
def test_against_the_definition(model: Llama, bos: BosRule, window: int, stride: int) -> None:
    """Each token by itself, from exactly what its window lets it see."""
    ids = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = ids if bos == "none" else [1, *ids]
    expected = []
    for place in range(1, len(whole)):
        number = 0 if place <= window else -(-(place - window) // stride)
        start = 0 if number == 0 else number * stride
        seen = [1, *whole[start + 1 : place]] if bos == "window" else whole[start:place]
        with torch.inference_mode():
            expected.append(-float(model(torch.tensor([seen])).logits[0, -1].log_softmax(-1)[whole[place]]))
    texts = [Text("a", "", ids), Text("b", "", ids[:7])]
    for batch in (1, 3):
        one, _ = score(model, texts, Cut(window, stride, bos), 1, batch)
        assert one.nats == pytest.approx(expected, rel=1e-9)


def test_the_cached_path_gives_the_same(model: Llama) -> None:
    ids = torch.randint(0, 300, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    [whole] = score(model, [Text("a", "", ids)], Cut(64, 64), 1)
    cache, logits = KVCache(model.config), []
    cache.select([0], [[3, 0]])
    with torch.inference_mode():
        for at in range(0, 50, 7):
            read = torch.tensor([[1, *ids][at : min(at + 7, 50)]])
            logits.append(model(read, cache=cache).logits[0])
    scores = torch.cat(logits).log_softmax(-1)
    assert whole.nats == pytest.approx([-float(scores[n, i]) for n, i in enumerate(ids)], rel=1e-9)


def test_a_model_that_knows_nothing(tokenizer: Tokenizer) -> None:
    model = Llama(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                              num_attention_heads=4))  # fmt: skip
    torch.nn.init.zeros_(model.lm_head.weight)
    text = "The meaning of life, 骆驼"
    result = perplexity(model, tokenizer, [text], quiet=True)
    count = len(tokenizer.encode(text, add_special_tokens=False))
    assert result["tokens"] == count
    assert result["bytes"] == len(text.encode())
    assert math.isclose(result["token_perplexity"], len(tokenizer), rel_tol=1e-5)
    assert math.isclose(result["bits_per_byte"], count * math.log2(len(tokenizer)) / len(text.encode()), rel_tol=1e-5)
    assert math.isclose(2 ** result["bits_per_byte"], result["byte_perplexity"], rel_tol=1e-9)
    assert "BOS before each" in result["protocol"]
    with pytest.raises(InputError, match="no text"):
        perplexity(model, tokenizer, [""], quiet=True)


def test_bleu_and_chrf_of_real_systems(data: Path) -> None:
    folder = data / "eval" / "mt" / "wmt17_ende"
    expected = json.loads((folder / "expected_sacrebleu.json").read_text())["scores"]
    reference = (folder / "newstest2017.ref.de").read_text().rstrip("\n").split("\n")
    assert len(expected) == 8
    for name in sorted(expected):
        hypotheses = (folder / f"{name}.hyp").read_text().rstrip("\n").split("\n")
        found = bleu(hypotheses, [reference], bootstrap=0, ter=False)
        assert math.isclose(found["bleu"]["score"], expected[name]["bleu"], abs_tol=1e-9)
        assert math.isclose(found["chrf"]["score"], expected[name]["chrf2"], abs_tol=1e-9)
        assert "tok:13a" in found["bleu"]["signature"]


def test_rouge_worked_by_hand() -> None:
    found = rouge(["the cat sat"], [["the cat lay down"]], stemmer=False, bootstrap=100)
    assert math.isclose(found["rouge1"]["precision"], 2 / 3)
    assert math.isclose(found["rouge1"]["recall"], 2 / 4)
    assert math.isclose(found["rouge2"]["fmeasure"], 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert found["rouge1"]["interval"] == 0
    best = rouge(["the cat sat"], [["nothing alike here"], ["the cat sat"]], bootstrap=0)
    assert best["rouge1"]["fmeasure"] == 1


@pytest.mark.parametrize("score", [bleu, rouge])
def test_files_that_do_not_line_up(score: object) -> None:
    with pytest.raises(InputError, match="2 hypotheses but reference 1 has 1"):
        score(["a", "b"], [["a"]])  # type: ignore[operator]


def test_a_tokenizer_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MeCab", None)
    with pytest.raises(InputError, match=r"ja-mecab: .*pip install"):
        bleu(["猫"], [["猫"]], tokenize="ja-mecab")


def test_references_that_are_doubtful() -> None:
    chinese = ["骆驼在沙漠里走，白天热，夜里冷。"]
    assert "--tokenize zh" in bleu(chinese, [chinese], bootstrap=0, ter=False)["warning"]
    found = bleu(chinese, [chinese], tokenize="zh", bootstrap=0, ter=False)
    assert "warning" not in found
    assert found["bleu"]["score"] == pytest.approx(100)
    ter = bleu(["骆驼在沙漠里走，白天热，夜里凉。"], [chinese], tokenize="zh", bootstrap=0)["ter"]
    assert 0 < ter["score"] < 20  # one of sixteen, not the whole line
    assert "asian:yes" in ter["signature"]
    assert "asian:no" in bleu(["a b"], [["a c"]], bootstrap=0)["ter"]["signature"]
    with pytest.raises(InputError, match="--bootstrap 1"):
        rouge(["a"], [["a"]], bootstrap=1)
    assert "1 of 2 segments" in bleu(["a", "b c"], [["", "b c"]], bootstrap=0, ter=False)["warning"]


def test_a_broken_model_has_no_score(model: Llama, tokenizer: Tokenizer) -> None:
    broken = Llama(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                               num_attention_heads=4))  # fmt: skip
    with torch.no_grad():
        broken.norm.weight[3] = torch.nan
    with pytest.raises(CamelidError, match="no probability"):
        perplexity(broken, tokenizer, ["a text"], quiet=True)
    question = Question("a", [" b", " c"], 0)
    with pytest.raises(CamelidError, match="no probability"):
        choice(broken, tokenizer, [question])


def test_a_text_without_spaces_is_no_word(tokenizer: Tokenizer) -> None:
    model = Llama(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                              num_attention_heads=4))  # fmt: skip
    found = perplexity(model, tokenizer, ["骆驼" * 200], quiet=True)
    assert found["word_perplexity"] is None
    assert math.isfinite(found["byte_perplexity"])
    assert "NaN" not in json.dumps(found)
    assert "Infinity" not in json.dumps(found)
