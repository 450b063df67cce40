"""Shared fixtures: extra material (CAMELID_TEST_DATA), tiny models, and a folder like the tutorial's checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # else each run of a test plans itself in a copy of the process, which loads it anew

from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokenizer.train import train

from .offline import sitecustomize

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
places = [str(Path(sitecustomize.__file__).parent), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))

TEXT = [
    "The meaning of life is to learn, and to teach what one has learned.",
    "def area(width, height):\n    return width * height  # in square metres",
    "骆驼在沙漠里走，白天热，夜里冷。",
    "Numbers: 1234567890, 3.14159. Café, naïve, Ω≈ç√∫. Tabs\tand  two spaces.",
] * 30


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of extra material; tests that need it are skipped without it."""
    root = os.environ.get("CAMELID_TEST_DATA", "")
    if not root or not Path(root).is_dir():
        pytest.skip("CAMELID_TEST_DATA is not set: this test needs the extra material")
    return Path(root)


@pytest.fixture
def tiny() -> LlamaConfig:
    """A grouped-query model of a few thousand weights."""
    return LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip


@pytest.fixture
def model(tiny: LlamaConfig) -> Llama:
    torch.manual_seed(0)
    return Llama(tiny).double().eval()


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained tokenizer folder of each kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    train(lambda: TEXT, root / "byte-level", 400, "byte-level")
    train(lambda: TEXT, root / "sentencepiece", 400, "sentencepiece")
    return {"byte-level": root / "byte-level", "sentencepiece": root / "sentencepiece"}


@pytest.fixture
def tokenizer(tokenizers: dict[str, Path]) -> Tokenizer:
    from camelid.tokenizer.load import from_folder

    return from_folder(tokenizers["byte-level"])


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers rounds RMSNorm to float32 even in a float64 model; ours does not. Lift its rounding."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A real model that `make test` fetches once (tools/smollm2.py); skipped when it is not there."""
    path = Path(__file__).parents[1] / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.skip("SmolLM2 is not in .cache: run tools/smollm2.py to fetch it")
    return path


def tiny_model(tokenizer: Tokenizer) -> Llama:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return Llama(config).float().eval()


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizers: dict[str, Path]) -> Tokenizer:
    from camelid.tokenizer.load import from_folder

    return from_folder(tokenizers["byte-level"])


@pytest.fixture(scope="session")
def folder(chat_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that chats, for whatever serves it."""
    from camelid.formats import save

    out = tmp_path_factory.mktemp("served") / "tiny"
    save(tiny_model(chat_tokenizer), out)
    chat_tokenizer.save(out)
    return out


@pytest.fixture(scope="session")
def life(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole small life in it (life.py)."""
    from .life import live

    root = tmp_path_factory.mktemp("life")
    live(root)
    return root
