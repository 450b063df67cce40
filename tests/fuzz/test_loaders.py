"""Thousands of damaged model files, each opened in a child under limits: refused by our own exceptions or opened, never
anything else (tests/fuzz/child.py has the oracle). A finding is repeated by `child.py KIND FOLDER NUMBER 1`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from camelid.formats import save
from camelid.formats.convert import convert
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.quantize.job import Wish, quantize
from camelid.tokenizer.load import from_folder

from .child import KINDS
from .handmade import CASES as CASES_BY_HAND

CHILD = Path(__file__).parent / "child.py"
CASES = int(os.environ.get("CAMELID_FUZZ", "100"))  # of each kind


@pytest.fixture(scope="session")
def sound(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small sound model of each kind, in a folder of its own."""
    root = tmp_path_factory.mktemp("sound")
    words = from_folder(tokenizers["byte-level"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    save(Llama(config).float(), root / "safetensors" / "m", max_shard_bytes=1 << 30)
    words.save(root / "safetensors" / "m")
    save(Llama(config).float(), root / "config" / "m", max_shard_bytes=60_000)
    words.save(root / "config" / "m")
    hf = root / "safetensors" / "m"
    (root / "gguf" / "m").mkdir(parents=True)
    convert(hf, root / "gguf" / "m" / "model.gguf", "gguf", kind="Q8_0")
    convert(hf, root / "pth" / "m", "meta")
    (root / "tokenizer").mkdir()
    words_only = root / "tokenizer" / "m"
    words_only.mkdir()
    words.save(words_only)
    quantize(hf, root / "quantized" / "m", Wish("int4"))
    return {kind: root / kind / "m" for kind in KINDS}


def findings(sound: Path, kind: str, first: int, count: int, *more: str) -> tuple[list[str], int]:
    command = [sys.executable, str(CHILD), kind, str(sound), str(first), str(count), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, cwd=CHILD.parents[2])
    if done.returncode:
        return [f"{kind}: the child ended with {done.returncode}: {done.stderr[-500:]}"], 0
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["opened"] + told["refused"] + len(told["found"]) >= count
    return told["found"], told["refused"]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_models_are_refused(sound: dict[str, Path], kind: str) -> None:
    found, refused = findings(sound[kind], kind, 0, CASES)
    assert found == []
    assert refused > CASES // 4  # the damage bites


@pytest.mark.parametrize("kind", CASES_BY_HAND)
def test_what_was_made_by_hand_is_refused(sound: dict[str, Path], kind: str) -> None:
    count = len(list(CASES_BY_HAND[kind]()))
    found, refused = findings(sound[kind], kind, 0, count, "made")
    assert found == []
    assert refused == count


def test_enough_was_made_by_hand() -> None:
    assert sum(len(list(cases())) for cases in CASES_BY_HAND.values()) == 724  # as README says


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_thousand_damaged_models(sound: dict[str, Path], kind: str) -> None:
    each = int(os.environ.get("CAMELID_EXAMPLES", "3400"))
    found, _ = findings(sound[kind], kind, 1_000_000, each)
    assert found == []
