"""What a model writes, scored: extraction, programs and their limits, templates at fault, the verb."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from camelid.cli import run as cli
from camelid.errors import InputError
from camelid.evaluate.answers import (
    AnswerTask,
    Asked,
    answers,
    asked_of,
    extracted,
    last_number,
    read_answer_task,
    score,
    scores,
)
from camelid.evaluate.programs import pass_at_k, passes
from camelid.formats import save
from camelid.generate.engine import Engine
from camelid.generate.sampling import SamplingParams
from camelid.model.llama import Llama
from camelid.tokenizer.tokenizer import Tokenizer

TASK = AnswerTask("t", "Q: {question}\nA:", " {answer}", "exact", max_new_tokens=6)
QUESTIONS = [Asked(f"Q: {text}\nA:", " 4") for text in ("one", "two and two", "骆驼", "and the last one")]


@pytest.fixture
def engine(scorer: Llama, tokenizer: Tokenizer) -> Engine:
    return Engine(scorer, tokenizer)


def test_each_question_gets_its_own_answer(engine: Engine) -> None:
    found = answers(engine, TASK, QUESTIONS, shots=[Asked("Q: zero\nA:", " 0")])
    assert engine.tokenizer is not None
    for asked, answer in zip(QUESTIONS, found["answers"], strict=True):
        prompt = engine.tokenizer.encode("Q: zero\nA: 0\n\n" + asked.prompt, parse_special=False)
        [alone] = engine.generate([prompt], SamplingParams(max_new_tokens=6))
        assert answer == {"question": asked.prompt, "reference": " 4", "answer": alone.text, "right": False}
    assert found["accuracy"] == 0
    assert found["questions"] == 4
    assert "1 shots, greedy, at most 6 new tokens" in found["protocol"]


def test_what_counts_as_right() -> None:
    found, right = scores("number", ["so 1,234.50 it is", "7 or 8", "none"], ["#### 1234.5", "#### 7", "#### 3"])
    assert (found, right) == ({"accuracy": 1 / 3, "right": 1}, [True, False, False])
    assert scores("exact", [" a ", "b"], ["a", "c"])[0]["accuracy"] == 0.5
    task = AnswerTask("t", "", "", "exact", extract=r"answer is (\w+)")
    assert extracted(task, "the answer is B. No, the answer is C.") == "C"
    assert extracted(task, "no idea") is None
    asked = [Asked("", "The answer is B."), Asked("", "C"), Asked("", "D")]
    texts = ["i have no idea", "so the answer is C", "the answer is B"]
    assert score(task, texts, asked, 1) == ({"accuracy": 1 / 3, "right": 1}, [False, True, False])
    optional = AnswerTask("t", "", "", "exact", extract=r"(?:x(a)|.)")
    assert extracted(optional, "xa..") == "a"
    assert [last_number(text) for text in (".5", "0.50", "-.5", "5")] == ["0.5", "0.5", "-0.5", "5"]


@pytest.mark.parametrize(
    ("program", "good"),
    [
        ("def f(x): return x + 1", True),
        ("def f(x): return x", False),
        ("def f(x): return 1 +", False),
        ("import sys\nsys.exit(0)", False),
        ("import os\ndef f(x): os._exit(0)", False),
        ("import os\nif os.fork(): os._exit(0)\ndef f(x): return 3", False),
        ("print('x' * (1 << 22))\ndef f(x): return 2", False),
        ("while True: pass\ndef f(x): return 2", False),
        ("a = bytearray(1 << 31)\ndef f(x): return 2", False),
        ("open('big', 'wb').write(b'x' * (1 << 24))\ndef f(x): return 2", False),
        ("import os\nassert 'HOME' not in os.environ\nassert os.listdir() == []\ndef f(x): return 2", True),
        ("\0", False),
        ("# coding: latin-1\ndef f(x): return len('ü') + 1", True),
        ("def f(x): return 2\n" + "# a long one\n" * 40_000, True),
        ("x = '\ud800'\ndef f(x): return 2", False),
    ],
)
def test_programs_run_apart(monkeypatch: pytest.MonkeyPatch, program: str, good: bool) -> None:
    monkeypatch.setattr("camelid.evaluate.programs.SECONDS", 2)
    assert passes(program, "assert f(1) == 2") is good


def test_a_program_has_no_network_where_that_can_be() -> None:
    """Nor this machine's own: what listens here is not there for it."""
    apart = ["unshare", "--map-root-user", "--net", "true"]
    if shutil.which("unshare") is None or subprocess.run(apart, capture_output=True, check=False).returncode:
        pytest.skip("this kernel gives an ordinary user no network of their own")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        program = "import socket\ntry:\n    socket.create_connection(('127.0.0.1', {}), timeout=1)\n    met = True\n"
        program = program.format(port) + "except OSError:\n    met = False\n"
        assert passes(program, "assert not met")


def test_what_a_program_started_ends_with_it(tmp_path: Path) -> None:
    late = tmp_path / "late"
    child = f"import time; time.sleep(1.5); open({str(late)!r}, 'w')"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n"
    assert passes(program, "")
    time.sleep(2.5)
    assert not late.exists()


def test_pass_at_k_is_the_share_of_draws() -> None:
    draw = random.Random(0)
    programs = [True] * 3 + [False] * 7
    hits = sum(any(draw.sample(programs, 4)) for _ in range(20_000)) / 20_000
    assert pass_at_k(10, 3, 4) == pytest.approx(hits, abs=0.01)
    assert (pass_at_k(5, 0, 1), pass_at_k(5, 5, 1), pass_at_k(5, 2, 4)) == (0.0, 1.0, 1.0)


def test_pass_at_k_over_questions() -> None:
    task = AnswerTask("t", "", "", "code")
    asked = [Asked("def f(x):", "", "assert f(1) == 2"), Asked("def f(x):", "", "assert f(1) == 3")]
    texts = [" return x + 1", " return 0", " return x + 1", " return 0"]
    assert score(task, texts, asked, 2) == ({"pass@1": 0.25}, [True, False])


def test_the_program_in_an_answer_runs_by_itself() -> None:
    task = AnswerTask("t", "", "", "code", extract=r"(?s)```python\n(.*?)```")
    asked = [Asked("Write add(a, b).", "", "assert add(1, 2) == 3")] * 2
    texts = ["Here it is:\n```python\ndef add(a, b): return a + b\n```\nDone.", "def add(a, b): return a + b"]
    assert score(task, texts, asked, 1) == ({"pass@1": 0.5}, [True, False])


def test_programs_need_leave(engine: Engine) -> None:
    task = read_answer_task("humaneval")
    with pytest.raises(InputError, match="--execute"):
        answers(engine, task, QUESTIONS)
    with pytest.raises(InputError, match="--samples 2"):
        answers(engine, TASK, QUESTIONS, samples=2)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('prompt = "x"\nreference = "y"\n', "lacks the field 'metric'"),
        ('prompt = "x"\nreference = "y"\nmetric = "taste"\n', "none of number, exact"),
        ('prompt = "x"\nreference = "y"\nmetric = "exact"\nextract = "("\n', "no pattern"),
        ('prompt = "x"\nreference = "y"\nmetric = "exact"\nextract = "a"\n', "no group"),
        ('prompt = "x"\nreference = "y"\nmetric = "exact"\nmax_tokens = 3\n', "no field 'max_tokens'"),
        ('prompt = "x"\nreference = "y"\nmetric = "exact"\nmax_new_tokens = "3"\n', "must be int"),
        ('prompt = "{x"\nreference = "y"\nmetric = "exact"\n', "prompt has a brace that is no field"),
        ("prompt", "known are arc"),
    ],
)
def test_templates_at_fault(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(InputError, match=why):
        read_answer_task(str(tmp_path / "t.toml"))


def test_rows_at_fault(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    with pytest.raises(InputError, match=r"line 2: not a row that the task gsm8k can fill.*'answer'"):
        asked_of(tmp_path / "q.jsonl", read_answer_task("gsm8k"))
    (tmp_path / "q.jsonl").write_text('{"question": null, "answer": "b"}\n')
    with pytest.raises(InputError, match="'question'"):
        asked_of(tmp_path / "q.jsonl", read_answer_task("gsm8k"))
    assert set(map(read_answer_task, ("gsm8k", "translation", "summary", "humaneval")))


def test_no_answer_is_cut_by_the_context(engine: Engine) -> None:
    wide = AnswerTask("t", "", "", "exact", max_new_tokens=250)
    with pytest.raises(InputError, match=r"question 2 needs \d+ tokens .* the model takes 256"):
        answers(engine, wide, [Asked("a", ""), Asked("a longer question than the other", "")])
    with pytest.raises(InputError, match="no tokenizer 'german'"):
        answers(engine, AnswerTask("t", "", "", "bleu", tokenize="german", max_new_tokens=4), QUESTIONS)


def test_the_verb(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert engine.tokenizer is not None
    save(engine.model, tmp_path / "m")
    engine.tokenizer.save(tmp_path / "m")
    rows = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(5)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["evaluate", "answers", str(tmp_path / "m"), "--data", str(tmp_path / "q.jsonl"), "--shots", "2"]
    (tmp_path / "short.toml").write_text('prompt = "{question}"\nreference = "{answer}"\nmetric = "number"\n'
                                         "max_new_tokens = 4\n")  # fmt: skip
    assert cli([*words, "--task", str(tmp_path / "short.toml"), "--json", "--out", str(tmp_path / "e")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["questions"] == 3
    assert {"accuracy", "right", "stopped_by_itself", "protocol"} <= found.keys()
    assert "2?" in (tmp_path / "e" / "report.html").read_text()
    (tmp_path / "rouge.toml").write_text('prompt = "{question}"\nreference = "{answer}"\nmetric = "rouge"\n'
                                         'tokenize = "zh"\nextract = "(x)"\nmax_new_tokens = 4\n')  # fmt: skip
    assert cli([*words, "--task", str(tmp_path / "rouge.toml"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["protocol"]
    assert "rouge of the answer, of what '(x)' finds last (" in told
    assert "zh" in told.split("finds last (")[1]
    assert cli([*words, "--task", "humaneval"]) == 2
    assert "--execute" in capsys.readouterr().err
