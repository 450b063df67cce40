"""The command line: a whole life on files, --json contracts, exit codes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from camelid.cli import run

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
        (["evaluate", "bleu", "--hypotheses", "no", "--references", "no"], "no: no such file"),
        (["lineage", "."], "not a model"),
        (["pretrian"], "did you mean 'pretrain'"),
        (["generate", "nowhere", "x", "--temperature", "-1"], "temperature"),
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


def test_failure_and_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    from camelid.errors import CamelidError

    for raised, code in ((CamelidError("broke"), 1), (KeyboardInterrupt(), 130)):

        def fail(_: object, raised: BaseException = raised) -> None:
            raise raised

        monkeypatch.setattr("camelid.cli.info.run", fail)
        assert run(["info"]) == code
