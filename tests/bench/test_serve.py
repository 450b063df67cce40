"""The race of servers, with ourselves alone: every answer counted, every wait told."""

from __future__ import annotations

from pathlib import Path

import pytest

from camelid.bench import serve
from camelid.errors import CamelidError
from camelid.tokenizer.tokenizer import Tokenizer


def test_both_of_ours_answer_everybody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "CLIENTS", (3,))
    monkeypatch.setattr(serve, "TOKENS", 8)
    monkeypatch.setattr(serve, "WORDS", ["camel"])
    result = serve.run(str(folder), threads=1, peers=False, quiet=True)
    assert [row["implementation"] for row in result["rows"]] == ["camelid int8", "camelid bf16"]
    for row in result["rows"]:
        assert row["value"] > 0
        assert row["tokens"] > 6 * 4
        assert 0 < row["first_token_p50"] <= row["first_token_p99"]


def test_a_server_that_does_not_start_is_told(chat_tokenizer: Tokenizer) -> None:
    server = serve.Server("broken", (), ("-m", "camelid", "serve", "/nonexistent", "--port", "PORT"))
    [row] = serve.measured(server, chat_tokenizer, 1)
    assert "ended with 2" in row["error"]
    with pytest.raises(CamelidError, match="not ready"):
        serve.wait_for(_Running(), serve.free_port(), 0.2)  # type: ignore[arg-type]


class _Running:
    def poll(self) -> None:
        return None
