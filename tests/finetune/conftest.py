"""A small model that answers four words, and files to teach it from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from camelid import Engine, SamplingParams
from camelid.finetune import finetune
from camelid.formats import load, save
from camelid.formats.load import load_tokenizer
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.recipe import Recipe, parse
from camelid.tokenizer.tokenizer import Tokenizer

SAID = {"ping": "pong", "tick": "tock", "sun": "moon", "up": "down"}
OTHERS = [*list(SAID.values())[1:], *list(SAID.values())[:1]]


def at_random(tokenizers: dict[str, Path], out: Path) -> Tokenizer:
    """Write a model that knows nothing yet; returns its tokenizer."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(tokenizers["byte-level"])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    save(Llama(config), out)
    tokenizer.save(out)
    return tokenizer


@pytest.fixture(scope="module")
def learned(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers each word of SAID with the next one's answer, and its tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("learned")
    tokenizer = at_random(tokenizers, folder / "random")
    rows = [{"prompt": q, "completion": a} for q, a in zip(SAID, OTHERS, strict=True)]
    chosen = recipe(folder / "random", written(folder / "x.jsonl", rows), folder / "run",
                    train={"steps": 150, "learning_rate": 5e-3})  # fmt: skip
    result = finetune(chosen, quiet=True)
    assert says(folder / "run", "ping") == ("tock", "eos")
    save(load(result["checkpoint"]), folder / "base")
    tokenizer.save(folder / "base")
    return folder / "base"


@pytest.fixture
def base(learned: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    shutil.copytree(learned, tmp_path / "base")
    return tmp_path / "base"


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def answers(folder: Path) -> str:
    return written(folder / "answers.jsonl", [{"prompt": q, "completion": a} for q, a in SAID.items()])


def pairs(folder: Path) -> str:
    rows = [{"prompt": q, "chosen": a, "rejected": o} for (q, a), o in zip(SAID.items(), OTHERS, strict=True)]
    return written(folder / "pairs.jsonl", rows)


def verdicts(folder: Path) -> str:
    rows = [{"prompt": q, "completion": a, "label": n % 2 == 0} for n, (q, a) in enumerate(SAID.items())]
    return written(folder / "verdicts.jsonl", rows)


def recipe(base: Path, files: str, out: Path, method: str = "full", **more: Any) -> Recipe:
    train = {"steps": 6, "sequence_length": 128, "global_batch_tokens": 256, "learning_rate": 1e-2,
             "warmup_steps": 1, "dtype": "float32", "threads": 1,
             "weight_decay": 0.0} | more.pop("train", {})  # fmt: skip
    sections = {"finetune": {"method": method, "rank": 4, "group": 16} | more.pop("finetune", {})}
    return parse({"model": {"from": str(base)}, "data": {"files": [files]} | more.pop("data", {}), "train": train,
                  "checkpoint": {"every": 2}, "log": {"out": str(out)}, **sections, **more})  # fmt: skip


def says(source: Path, asked: str) -> tuple[str, str]:
    engine = Engine.from_pretrained(source)
    assert engine.tokenizer is not None
    ids = engine.tokenizer.apply_chat_template([{"role": "user", "content": asked}])
    [result] = engine.generate([ids], SamplingParams(max_new_tokens=12))
    return result.text, result.finish_reason
