"""The command line: a whole life on files, --json contracts, exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from camelid.artifact import damage
from camelid.cli import run
from camelid.evaluate.templates import read_rows
from camelid.recipe import load
from camelid.tokenizer.load import from_folder

from ..conftest import TEXT

RECIPE = """
[model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 1
num_attention_heads = 4
[data]
tokens = "{root}/tokens"
[train]
steps = 5
sequence_length = 16
global_batch_tokens = 64
[log]
out = "{root}/run"
"""


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """corpus -> tokenizer -> tokens -> pretrain -> finetune, as a person would type it; every --json object."""
    root = tmp_path_factory.mktemp("life")
    (root / "raw").mkdir()
    for number, text in enumerate(TEXT[:40]):
        (root / "raw" / f"{number:02}.txt").write_text(f"{number}. {text}")
    (root / "r.toml").write_text(RECIPE.format(root=root))
    (root / "sft.toml").write_text(
        f'[model]\nfrom = "{root}/run"\n[data]\nfiles = ["{root}/chats.jsonl"]\n[train]\nsteps = 2\n'
        f'sequence_length = 64\nglobal_batch_tokens = 64\n[log]\nout = "{root}/sft"\n'
    )
    (root / "chats.jsonl").write_text('{"prompt": "ping", "completion": "pong"}\n')
    verbs = {
        "corpus": ["corpus", "build", root / "raw", "--out", root / "corpus", "min_characters=10"],
        "tokenizer": ["tokenizer", "train", root / "corpus", "--out", root / "tok", "--vocab-size", 300],
        "tokens": ["tokens", "build", root / "corpus", "--tokenizer", root / "tok", "--out", root / "tokens"],
        "pretrain": ["pretrain", root / "r.toml", "train.seed=3"],
        "finetune": ["finetune", root / "sft.toml"],
    }
    results = {}
    for verb, words in verbs.items():
        code, results[verb] = call([*map(str, words)])
        assert code == 0, verb
    return root, results


def call(words: list[str]) -> tuple[int, Any]:
    """Run with --json; nothing but one object may be on stdout."""
    import contextlib

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = run([*words, "--json"])
    text = out.getvalue()
    return code, json.loads(text) if text else None


def test_json_contract_of_making(life: tuple[Path, dict[str, Any]]) -> None:
    _, results = life
    assert {"documents", "bytes", "digest", "out"} <= results["corpus"].keys()
    assert {"vocab_size", "kind", "digest", "out"} <= results["tokenizer"].keys()
    keys = {"steps", "loss", "tokens", "tokens_per_second", "checkpoint", "digest", "planned", "measured"}
    assert keys <= results["pretrain"].keys()
    assert keys <= results["finetune"].keys()


def test_json_contract_of_using(life: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    root, _ = life
    code, result = call(["generate", str(root / "run"), "The meaning", "--max-new-tokens", "5"])
    assert code == 0
    assert set(result) == {"text", "ids", "finish_reason", "prompt_tokens", "completion_tokens"}
    assert result["completion_tokens"] == len(result["ids"]) <= 5
    code, result = call(["evaluate", "perplexity", str(root / "run"), "--data", str(root / "raw" / "00.txt")])
    keys = {"token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "tokens", "bytes", "protocol"}
    assert code == 0
    assert keys <= result.keys()
    monkeypatch.setattr("sys.stdin", io.StringIO("骆驼\n"))
    code, result = call(["tokenizer", "encode", str(root / "tok")])
    assert code == 0
    assert len(result["ids"]) == len(result["tokens"]) > 0
    monkeypatch.setattr("sys.stdin", io.StringIO("ping\n/reset\nping\n/quit\n"))
    code, result = call(["chat", str(root / "sft"), "--max-new-tokens", "4"])
    assert code == 0
    assert [m["role"] for m in result["messages"]] == ["user", "assistant"]


def test_line_ends_and_marks_of_other_systems(tmp_path: Path) -> None:
    """One segment a line: a carriage return within one parts nothing, at its end it is no text, nor is a mark."""
    (tmp_path / "h").write_bytes(b"\xef\xbb\xbfthe cat\rsat down here\r\na dog ran there now\r\n")
    (tmp_path / "r").write_bytes(b"the cat sat down here\na dog ran there now\n")
    code, result = call(["evaluate", "bleu", "--hypotheses", str(tmp_path / "h"), "--references", str(tmp_path / "r")])
    assert code == 0
    assert result["bleu"]["score"] == pytest.approx(100)
    (tmp_path / "r.toml").write_bytes(b"\xef\xbb\xbf[train]\nsteps = 3\n")
    assert load(tmp_path / "r.toml").train.steps == 3
    rows = b'\xef\xbb\xbf{"question": "q", "answer": "a"}\n'
    (tmp_path / "q.jsonl").write_bytes(rows)
    assert read_rows(tmp_path / "q.jsonl", lambda row: row["answer"], "a row") == ["a"]


def test_every_character_of_the_input_counts(tokenizers: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text that is piped in, a mark at its beginning too."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\ufeffab".encode())))
    code, found = call(["tokenizer", "encode", str(tokenizers["byte-level"])])
    assert code == 0
    assert found["ids"] == from_folder(tokenizers["byte-level"]).encode("\ufeffab")


def test_json_in_the_letters_of_the_terminal(life: tuple[Path, dict[str, Any]]) -> None:
    words = ["tokenizer", "encode", str(life[0] / "tok"), "--json"]
    for letters in ("ascii", "gbk", "utf-8"):
        done = subprocess.run(
            [sys.executable, "-m", "camelid", *words], capture_output=True, check=True, input="骆驼 é".encode(),
            env={**os.environ, "PYTHONIOENCODING": letters},
        )  # fmt: skip
        assert json.loads(done.stdout.decode(letters))["ids"]
        assert (b"\\u" in done.stdout) == (letters != "utf-8")


def test_a_page_takes_the_place_of_a_page_only(life: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    words = ["tokenizer", "inspect", str(life[0] / "tok"), "--out"]
    (tmp_path / "letters.txt").write_text("dear")
    for name, code in (("letters.txt", 2), (".", 2), ("new/page.html", 0), ("new/page.html", 0)):
        assert run([*words, str(tmp_path / name)]) == code
    assert (tmp_path / "letters.txt").read_text() == "dear"


def test_json_contract_of_scores(tmp_path: Path) -> None:
    (tmp_path / "h").write_text("the cat sat\na dog ran\n")
    for name, keys in (("bleu", {"bleu", "chrf", "ter"}), ("rouge", {"rouge1", "rouge2", "rougeL", "rougeLsum"})):
        code, result = call(
            ["evaluate", name, "--hypotheses", str(tmp_path / "h"), "--references", str(tmp_path / "h")]
        )
        assert code == 0
        assert keys | {"protocol"} == result.keys()


def test_lineage_reaches_the_raw_files(life: tuple[Path, dict[str, Any]]) -> None:
    root, _ = life
    code, tree = call(["lineage", str(root / "sft")])
    assert code == 0

    def leaves(node: dict[str, Any]) -> set[str]:
        return {node["path"]} if not node["inputs"] else set().union(*map(leaves, node["inputs"]))

    assert {str(root / "raw" / f"{n:02}.txt") for n in range(40)} <= leaves(tree)
    assert str(root / "chats.jsonl") in leaves(tree)

    def changed(node: dict[str, Any]) -> set[str]:
        here = {node["path"]} if node.get("changed") else set()
        return here.union(*map(changed, node["inputs"]))

    assert not changed(tree)
    original = (root / "raw" / "07.txt").read_text()
    (root / "raw" / "07.txt").write_text("edited later")
    assert changed(call(["lineage", str(root / "sft")])[1]) == {str(root / "raw" / "07.txt")}
    (root / "raw" / "07.txt").write_text(original)


def test_info(life: tuple[Path, dict[str, Any]]) -> None:
    root, _ = life
    assert "torch" in call(["info"])[1]
    assert call(["info", str(root / "run")])[1]["format"] == "hf"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", "nowhere", "x"], "no model at nowhere"),
        (["pretrain", "nowhere.toml"], "no recipe at nowhere.toml"),
        (["corpus", "build", "nowhere", "--out", "o"], "nowhere"),
        (["corpus", "build", ".", "--out", "o", "min_charcters=3"], "did you mean 'min_characters'"),
        (["evaluate", "bleu", "--hypotheses", "no", "--references", "no"], "no cannot be read: No such file"),
        (["lineage", "."], "not a model"),
        (["tokenizer", "train", __file__, "--out", "o"], "is a file, where a folder that camelid made is needed"),
        (["corpus", "build", __file__, "--out", "o", "languages=en,english"], "'english' is no ISO 639 code"),
        (["generate", "nowhere", "x", "--json-schema", "none.json"], "none.json cannot be read"),
        (["pretrian"], "did you mean 'pretrain'"),
        (["generate", "nowhere", "x", "--temperature", "-1"], "temperature"),
        (["convert", __file__, "--type", "q4_k_m", "--out", "x.gguf"], "--type Q4_K_M is for --to gguf"),
        (["bench", "infer", "--rounds", "0"], "'0' is no whole number above 0"),
        (["bench", "train", "--steps", "1"], "2 at least"),
        (["bench", "evaluate", "m", "--threads", "1,x"], "'x' is no whole number"),
        (["evaluate", "bleu", "--hypotheses", "-", "--references", "r", "--out", "o"], "name files instead of -"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("camelid: ")
    assert error.count("\n") == 1
    assert says in error
    assert not list(tmp_path.iterdir())


def test_bytes_that_are_no_text(life: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, _ = life
    camelid = [sys.executable, "-m", "camelid"]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    for words in (["tokenizer", "encode", str(root / "tok")], ["generate", str(root / "run"), "-"]):
        done = subprocess.run([*camelid, *words], input=b"caf\xff", capture_output=True, env=strict)
        assert done.returncode == 2
        assert done.stderr.startswith(b"camelid: standard input is not UTF-8")
    place = tmp_path / os.fsdecode(b"lat\xe9")  # a name of another age
    place.mkdir()
    done = subprocess.run(
        [*camelid, "corpus", "build", str(root / "raw"), "--out", str(place / "c")], capture_output=True
    )
    assert done.returncode == 2  # Arrow writes to no such place
    assert b"holds bytes that are not UTF-8" in done.stderr
    words = ["tokenizer", "train", str(root / "corpus"), "--out", str(place / "tok"), "--vocab-size", "300"]
    done = subprocess.run([*camelid, *words], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert damage(place / "tok") is None
    assert "lat\\udce9" in (place / "tok" / "camelid.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("words", ["--help", "doctor", "completion bash", "info"])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_had_enough(words: str, buffered: str) -> None:
    command = f"{sys.executable} -m camelid {words} | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": buffered},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_of_another_kind_is_not_replaced(
    life: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = life
    for words in (
        ["tokenizer", "train", str(root / "corpus"), "--out", str(root / "corpus"), "--vocab-size", "300"],
        ["tokens", "build", str(root / "corpus"), "--tokenizer", str(root / "tok"), "--out", str(root / "tok")],
    ):
        assert run(words) == 2
        assert "would take the place of: choose another --out" in capsys.readouterr().err
    assert damage(root / "corpus") is None
    assert damage(root / "tok") is None


def test_failure_and_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    from camelid.errors import CamelidError

    for raised, code in ((CamelidError("broke"), 1), (KeyboardInterrupt(), 130)):

        def fail(_: object, raised: BaseException = raised) -> None:
            raise raised

        monkeypatch.setattr("camelid.cli.info.run", fail)
        assert run(["info"]) == code
