"""What the training tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.write import build

from ..conftest import TEXT


@pytest.fixture
def tokens(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    build(TEXT, tokenizer, tmp_path / "tokens", [])
    return tmp_path / "tokens"
