"""Perplexity by definition; BLEU and ROUGE against published figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from camelid.errors import InputError
from camelid.evaluate import bleu, perplexity, rouge
from camelid.evaluate.perplexity import negative_log_likelihood, windows
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.tokenizer.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(1, 8, 4), (2, 8, 4), (8, 8, 4), (9, 8, 4), (100, 8, 3), (50, 8, 7)]
)
def test_windows_score_every_token_once(length: int, window: int, stride: int) -> None:
    scored = []
    for start, end, first in windows(length, window, stride):
        assert 0 <= start < first < end <= length
        assert end - start <= window
        assert start == 0 or first - start >= window - stride
        scored += range(first, end)
    assert scored == list(range(1, length))


def test_against_the_definition(model: Llama) -> None:
    ids = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        scores = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    expected = -sum(scores[i, ids[i + 1]].item() for i in range(39))
    assert abs(negative_log_likelihood(model, ids, 64, 32) - expected) < 1e-3
    assert abs(negative_log_likelihood(model, ids, 16, 8) - expected) > 1e-4  # less context, another number


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
    assert "BOS first" in result["protocol"]
    with pytest.raises(InputError, match="no text"):
        perplexity(model, tokenizer, [""], quiet=True)


def test_bleu_and_chrf_of_real_systems(data: Path) -> None:
    folder = data / "eval" / "mt" / "wmt17_ende"
    expected = json.loads((folder / "expected_sacrebleu.json").read_text())["scores"]
    reference = (folder / "newstest2017.ref.de").read_text().rstrip("\n").split("\n")
    for name in sorted(expected)[:3]:
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
