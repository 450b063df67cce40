"""What the training tests share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.write import build
from camelid.train import checkpoint
from camelid.train.checkpoint import LoopState, Saver
from camelid.train.optimizer import AdamW

from ..conftest import TEXT


@pytest.fixture
def tokens(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    build(TEXT, tokenizer, tmp_path / "tokens", [])
    return tmp_path / "tokens"


@dataclass
class Trained:
    """A tiny model with moments, and a run folder that it is saved into."""

    model: Llama
    optimizer: AdamW
    tokenizer: Tokenizer
    run: Path

    def save(self, step: int, keep: int = 2) -> None:
        self.model(torch.arange(8)[None]).logits.square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        taken = checkpoint.snapshot(self.model, self.optimizer, LoopState(step=step), keep=True, copy=True)
        saver = Saver(self.run, keep)
        parts = {"tokenizer": self.tokenizer, "inputs": [], "settings": {}, "generation": {}}
        saver.save(taken, background=True, **parts)
        saver.wait()


@pytest.fixture
def small() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=400, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
