"""What the evaluation tests share."""

from __future__ import annotations

import pytest
import torch

from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.tokenizer.tokenizer import Tokenizer


@pytest.fixture
def scorer(tokenizer: Tokenizer) -> Llama:
    """A grouped-query model of the test tokenizer's vocabulary, with a context of 256."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)  # fmt: skip
    return Llama(config).eval()
