"""Every folder that a command made can be made again, to the same bits; where it cannot, that is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from camelid import cli
from camelid.artifact import damage
from camelid.errors import InputError
from camelid.formats import save
from camelid.reproduce import reproduce
from camelid.tokenizer.tokenizer import Tokenizer

from .conftest import tiny_model
from .life import VERBS, words


@pytest.mark.parametrize("name", [name for name in VERBS if name != "convert-gguf"])
def test_the_same_bits(name: str, life: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.run(words(name, out, life)) == 0
    capsys.readouterr()
    assert cli.run(["reproduce", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert len(found["files"]) >= 1
    assert all(file["same"] for file in found["files"])
    assert (found["settings"], found["versions"]) == ({}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]  # nothing is left beside it


def test_another_result_is_told(life: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a command makes is compared with what was there: here, a folder that the command did not make."""
    out = tmp_path / "out"
    assert cli.run(words("tokenizer", out, life, "--vocab-size 390")) == 0
    manifest = (out / "camelid.json").read_text()
    body = manifest.partition(',\n "seal"')[0].replace('"390"', '"380"')
    (out / "camelid.json").write_text(body + "\n}")
    assert cli.run(["reproduce", str(out)]) == 1
    told = capsys.readouterr()
    assert "OTHER tokenizer.json" in told.out
    assert "settings: vocab_size was 390, is 380" in told.out
    assert "2 of 4 files came out otherwise" in told.err


def test_a_changed_input_is_told(life: Path, tmp_path: Path) -> None:
    shutil.copytree(life / "text", tmp_path / "text")
    assert cli.run(["corpus", "build", str(tmp_path / "text"), "--out", str(tmp_path / "out"), "filters=[]"]) == 0
    (tmp_path / "text" / "0.txt").write_text("another text")
    with pytest.raises(InputError, match=r"0\.txt is not what it was"):
        reproduce(tmp_path / "out")


def test_what_python_made_names_no_command(chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    save(tiny_model(chat_tokenizer), tmp_path / "out")
    assert damage(tmp_path / "out") is None
    with pytest.raises(InputError, match="made from Python"):
        reproduce(tmp_path / "out")
