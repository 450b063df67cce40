"""camelid generate: one text streamed, the best of several, a beam search; and wishes that contradict each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from camelid.cli import run
from camelid.formats.hf import save
from camelid.generate.beam import BeamParams
from camelid.generate.engine import Engine
from camelid.generate.sampling import SamplingParams
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.tokenizer.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=128)  # fmt: skip
    save(Llama(config), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def test_a_search_and_the_best_of_several(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine.from_pretrained(folder)
    [searched] = engine.beam_search("The meaning", BeamParams(3, max_new_tokens=9, length_penalty=0.5))
    [best] = engine.several("The meaning", SamplingParams(max_new_tokens=9, temperature=1.0, seed=1), 1, best_of=6)
    asked = ["generate", str(folder), "The meaning", "--max-new-tokens", "9"]
    assert run([*asked, "--num-beams", "3", "--length-penalty", "0.5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["ids"], told["score"]) == (searched.ids, searched.score)
    assert run([*asked, "--best-of", "6", "--temperature", "1", "--seed", "1"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{best.text}\n"
    assert f"score {best.score:.3f}" in shown.err


@pytest.mark.parametrize(
    ("options", "why"),
    [(["--num-beams", "2", "--repetition-penalty", "1.3"], "--repetition-penalty"),
     (["--length-penalty", "2"], "give --num-beams"),
     (["--num-beams", "2", "--temperature", "1"], "--num-beams with --temperature"),
     (["--num-beams", "2", "--best-of", "2", "--temperature", "1"], "--num-beams with --best-of"),
     (["--num-beams", "0"], "num_beams"), (["--best-of", "3"], "--best-of draws texts"),
     (["--best-of", "0", "--temperature", "1"], "best_of")],
)  # fmt: skip
def test_wishes_that_do_not_go_together(
    folder: Path, options: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", str(folder), "The meaning", *options]) == 2
    assert why in capsys.readouterr().err
