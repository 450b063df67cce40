"""Each kind of tokenizer in turn."""

from __future__ import annotations

from pathlib import Path

import pytest

from camelid.tokenizer.load import from_folder
from camelid.tokenizer.tokenizer import Tokenizer


@pytest.fixture(params=["byte-level", "sentencepiece"])
def each(request: pytest.FixtureRequest, tokenizers: dict[str, Path]) -> Tokenizer:
    return from_folder(tokenizers[request.param])
