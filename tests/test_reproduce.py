"""Every folder that a command made can be made again, to the same bits; where it cannot, that is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from camelid import cli
from camelid.artifact import damage, lineage, new_folder, write_manifest
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


def test_a_download_that_changed_is_told(chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A folder that camelid did not make has no manifest, and is known by what it holds."""
    save(tiny_model(chat_tokenizer), tmp_path / "hf")
    chat_tokenizer.save(tmp_path / "hf")
    (tmp_path / "hf" / "camelid.json").unlink()
    assert cli.run(["convert", str(tmp_path / "hf"), "--out", str(tmp_path / "copy")]) == 0
    assert [node["changed"] for node in lineage(tmp_path / "copy")["inputs"]] == [False]
    with (tmp_path / "hf" / "model.safetensors").open("r+b") as file:
        file.seek(-8, 2)
        file.write(bytes(8))
    assert [node["changed"] for node in lineage(tmp_path / "copy")["inputs"]] == [True]
    with pytest.raises(InputError, match="is not what it was"):
        reproduce(tmp_path / "copy")


def test_what_weights_were_rounded_by_is_known(chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    save(tiny_model(chat_tokenizer), tmp_path / "m")
    chat_tokenizer.save(tmp_path / "m")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("The meaning of life is to learn. " * 40)
    words = ["--format", "int8", "--calibration", str(tmp_path / "*.txt"), "--out", str(tmp_path / "q")]
    assert cli.run(["quantize", str(tmp_path / "m"), *words]) == 0
    assert [Path(node["path"]).name for node in lineage(tmp_path / "q")["inputs"]] == ["m", "a.txt", "b.txt"]
    (tmp_path / "b.txt").write_text("other words")
    assert [node["changed"] for node in lineage(tmp_path / "q")["inputs"]] == [False, False, True]


def test_where_the_way_back_is_closed(chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The ancestor's manifest was cut; and another's folder, which may not be looked into."""
    for name, inputs in (("first", []), ("second", [tmp_path / "first"]), ("third", [tmp_path / "second"])):
        with new_folder(tmp_path / name, "test") as folder:
            write_manifest(folder, "test", inputs)
    path = tmp_path / "first" / "camelid.json"
    path.write_text(path.read_text()[:40])
    [second] = lineage(tmp_path / "third")["inputs"]
    [first] = second["inputs"]
    assert (second["changed"], first["changed"], first["path"]) == (False, True, str(tmp_path / "first"))
    is_file = Path.is_file

    def closed(self: Path) -> bool:
        if self.parent.name == "second":
            raise PermissionError(13, "Permission denied")
        return is_file(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "is_file", closed)
        [second] = lineage(tmp_path / "third")["inputs"]
    assert (second["changed"], second["inputs"]) == (True, [])


def test_what_python_made_names_no_command(chat_tokenizer: Tokenizer, tmp_path: Path) -> None:
    save(tiny_model(chat_tokenizer), tmp_path / "out")
    assert damage(tmp_path / "out") is None
    with pytest.raises(InputError, match="made from Python"):
        reproduce(tmp_path / "out")


def test_by_relative_names_and_from_elsewhere(
    life: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command was given in one folder with names that count from there; it is repeated from another."""
    work = tmp_path / "work"
    shutil.copytree(life / "corpus", work / "corpus")
    shutil.copytree(life / "tokenizer", work / "tokenizer")
    shutil.copy(life / "pretrain.toml", work)
    monkeypatch.chdir(work)
    assert cli.run(["tokens", "build", "corpus", "--tokenizer", "tokenizer", "--out", "tokens"]) == 0
    assert cli.run(["pretrain", "pretrain.toml", "data.tokens=tokens", "log.out=run"]) == 0
    for name in ("json", "camelid", "argparse"):  # what lies there is not our code
        (work / f"{name}.py").write_text("open('owned', 'w').close()\nraise SystemExit(1)\n", encoding="utf-8")
    monkeypatch.chdir(work / "tokens")
    assert cli.run(["reproduce", "."]) == 0
    assert cli.run(["reproduce", "../run"]) == 0
    assert "OTHER" not in capsys.readouterr().out
    assert sorted(p.name for p in work.iterdir() if p.suffix != ".py") == [
        "corpus",
        "pretrain.toml",
        "run",
        "tokenizer",
        "tokens",
    ]


def with_command(folder: Path, *command: str) -> Path:
    """A folder that says it was made by this."""
    manifest = json.loads((folder / "camelid.json").read_text())
    manifest |= {"inputs": [], "made_by": {"command": command, "folder": str(folder.parent)}}
    manifest.pop("seal")
    (folder / "camelid.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["evaluate", "answers", "m", "--data", "q", "--execute", "--out", "x"], "not a command to repeat on trust"),
        (["serve", "m", "--out", "x"], "not a command to repeat on trust"),
        (["quickstart", "--out", "x"], "a part of the quickstart"),
        (["corpus", "build", "-", "--out", "x"], "standard input"),
        (["tokens", "build", "x"], "names no --out"),
    ],
)
def test_a_folder_from_somebody_runs_nothing_but_what_makes_folders(
    life: Path, tmp_path: Path, command: list[str], told: str
) -> None:
    shutil.copytree(life / "tokenizer", tmp_path / "gift")
    with pytest.raises(InputError, match=told):
        reproduce(with_command(tmp_path / "gift", *command))
    assert [p.name for p in tmp_path.iterdir()] == ["gift"]


def test_a_run_by_the_clock_is_not_compared(life: Path, tmp_path: Path) -> None:
    shutil.copytree(life / "model", tmp_path / "model")
    manifest = json.loads((tmp_path / "model" / "camelid.json").read_text())
    manifest["settings"]["train"]["minutes"] = 0.05
    manifest.pop("seal")
    (tmp_path / "model" / "camelid.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="as long as the clock allowed"):
        reproduce(tmp_path / "model")
