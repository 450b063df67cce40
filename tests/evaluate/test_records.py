"""Evaluation folders: what they keep, what is compared, and the card that is made of them."""

from __future__ import annotations

import html
import json
import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from camelid.artifact import damage
from camelid.cli import run as cli
from camelid.errors import InputError
from camelid.evaluate.card import card as make_card
from camelid.evaluate.compare import _means, compare, mcnemar
from camelid.evaluate.perplexity import BosRule, measured
from camelid.evaluate.record import coloured, read
from camelid.formats import load, save
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.write import build

from ..conftest import TEXT


@pytest.fixture
def folders(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """Two small models, the second one's scores sharper, and a text."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = Llama(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                  num_attention_heads=4, max_position_embeddings=128))  # fmt: skip
        with torch.no_grad():
            model.lm_head.weight.mul_(1 if seed == 0 else 8)
        save(model, tmp_path / f"m{seed}")
        tokenizer.save(tmp_path / f"m{seed}")
    rows = [{"text": text * (1 + n % 3)} for n, text in enumerate(TEXT[:40])]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli(["evaluate", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_perplexities_side_by_side(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (
        call(
            capsys,
            "perplexity",
            str(folders / f"m{n}"),
            "--data",
            str(folders / "d.jsonl"),
            "--out",
            str(folders / f"e{n}"),
        )
        for n in (0, 1)
    )
    assert damage(folders / "e0") is None
    manifest, kept = read(folders / "e0")
    assert manifest["figures"]["protocol"] == one["protocol"]
    assert math.fsum(math.fsum(i["nats"]) for i in kept["items"]) == pytest.approx(one["nats"])
    assert [len(i["nats"]) for i in kept["items"]] == [d["tokens"] for d in one["documents"]]
    found = call(capsys, "compare", str(folders / "e0"), str(folders / "e1"))["figures"]["bits_per_byte"]
    assert found["first"] == pytest.approx(one["bits_per_byte"])
    assert found["difference"] == pytest.approx(two["bits_per_byte"] - one["bits_per_byte"])
    assert found["interval"][0] <= found["difference"] <= found["interval"][1]
    assert found["p"] < 0.01
    same = compare(folders / "e0", folders / "e0")["figures"]["bits_per_byte"]
    assert (same["difference"], same["p"]) == (0, 1)


def test_what_cannot_be_compared(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "h").write_text("the cat sat\n")
    (folders / "other.txt").write_text("another text\n")
    call(capsys, "perplexity", str(folders / "m0"), "--data", str(folders / "d.jsonl"), "--out", str(folders / "a"))
    call(capsys, "perplexity", str(folders / "m0"), "--data", str(folders / "other.txt"), "--out", str(folders / "b"))
    call(
        capsys,
        "bleu",
        "--hypotheses",
        str(folders / "h"),
        "--references",
        str(folders / "h"),
        "--out",
        str(folders / "c"),
    )
    for other, why in (("b", "different data"), ("c", "measures perplexity"), ("m0", "is a model folder")):
        with pytest.raises(InputError, match=why):
            compare(folders / "a", folders / other)


def test_chance_finds_what_chance_makes() -> None:
    """Of 200 pairs of systems that are equally good, a twentieth differ with p < 0.05, and 95 % of intervals hold the
    true difference."""
    rng = np.random.default_rng(1)
    tried, significant, held = 200, 0, 0
    for _ in range(tried):
        one = rng.normal(0.0, 1.0, 60)
        two = one + rng.normal(0.0, 0.5, 60)  # paired, the mean of the difference is 0
        found = _means(one.tolist(), two.tolist())
        significant += found["p"] < 0.05
        held += found["interval"][0] <= 0 <= found["interval"][1]
    assert 0.02 <= significant / tried <= 0.08
    assert 0.92 <= held / tried <= 0.98


def test_a_long_document_is_drawn_from_by_stretches(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "long.txt").write_text("\n".join(TEXT * 3))
    for n in (0, 1):
        words = [str(folders / f"m{n}"), "--data", str(folders / "long.txt"), "--out", str(folders / f"l{n}")]
        call(capsys, "perplexity", *words)
    found = compare(folders / "l0", folders / "l1")["figures"]["bits_per_byte"]
    assert re.fullmatch(r"[2-9]\d stretches of 256 tokens", found["over"])
    assert found["interval"][0] < found["difference"] < found["interval"][1]
    assert found["p"] < 0.01
    assert compare(folders / "l0", folders / "l0")["figures"]["bits_per_byte"]["p"] == 1


def test_too_few_to_tell(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "one.txt").write_text("The meaning of life is to learn.")
    for n in (0, 1):
        words = [str(folders / f"m{n}"), "--data", str(folders / "one.txt"), "--out", str(folders / f"o{n}")]
        call(capsys, "perplexity", *words)
    found = compare(folders / "o0", folders / "o1")["figures"]["bits_per_byte"]
    assert (found["interval"], found["p"]) == (None, None)
    assert "fewer than 20" in found["why"]


def test_a_changed_record_is_refused(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "perplexity", str(folders / "m0"), "--data", str(folders / "d.jsonl"), "--out", str(folders / "e"))
    path = folders / "e" / "result.json"
    path.write_text(path.read_text().replace('"bytes"', '"byte5"', 1))
    with pytest.raises(InputError, match=r"result\.json is damaged"):
        read(folders / "e")


def test_unlike_tasks_and_scores_are_told(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"question": f"{n}?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"} for n in range(9)
    ]
    (folders / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for task in ("arc", "commonsense_qa"):
        words = [str(folders / "m0"), "--data", str(folders / "q.jsonl"), "--task", task, "--out", str(folders / task)]
        call(capsys, "choice", *words)
    assert "protocols differ" in compare(folders / "arc", folders / "commonsense_qa")["warning"]
    assert compare(folders / "arc", folders / "arc")["figures"]["accuracy"]["p"] == 1
    (folders / "h").write_text("the cat sat on the mat\na dog ran\n")
    for cut in ("13a", "zh"):
        words = ["--hypotheses", str(folders / "h"), "--references", str(folders / "h"), "--tokenize", cut]
        call(capsys, "bleu", *words, "--out", str(folders / cut))
    with pytest.raises(InputError, match="scored differently"):
        compare(folders / "13a", folders / "zh")
    few = compare(folders / "13a", folders / "13a")["figures"]
    assert [few[key]["p"] for key in ("bleu", "chrf")] == [None, None]
    assert "fewer than 20" in few["bleu"]["why"]
    (folders / "h").write_text("the cat sat on the mat\na dog ran\n" * 10)
    words = ["--hypotheses", str(folders / "h"), "--references", str(folders / "h")]
    call(capsys, "bleu", *words, "--out", str(folders / "many"))
    assert cli(["evaluate", "compare", str(folders / "13a"), str(folders / "13a")]) == 0
    assert "fewer than 20" in capsys.readouterr().out
    same = compare(folders / "many", folders / "many")["figures"]
    assert [same[key]["p"] for key in ("bleu", "chrf")] == [1, 1]


def test_records_of_folders_of_texts(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (folders / "texts" / name).write_text(f"a text named {name}")
    call(capsys, "perplexity", str(folders / "m0"), "--data", str(folders / "texts"), "--out", str(folders / "e"))
    assert [d["name"] for d in read(folders / "e")[0]["data"]] == ["a.txt", "b.txt"]
    (folders / "busy").mkdir()
    (folders / "busy" / "mine").write_text("x")
    words = ["evaluate", "perplexity", str(folders / "m0"), "--data", str(folders / "texts"), "--out"]
    assert cli([*words, str(folders / "busy")]) == 2
    told = capsys.readouterr()
    assert "not an output of camelid" in told.err
    assert "perplexity" not in told.out  # before the work


def test_mcnemar_is_the_binomial() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    rng = np.random.default_rng(0)
    extreme = (np.abs(rng.binomial(30, 0.5, 100_000) - 15) >= 6).mean()
    assert mcnemar(9, 21) == pytest.approx(extreme, abs=5e-3)


def test_paired_bleu_is_sacrebleus(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against sacrebleu's own command on two real systems; only a part of the lines, for time."""
    folder = data / "eval" / "mt" / "wmt17_ende"
    names = ["newstest2017.uedin-nmt.4722.en-de.hyp", "newstest2017.xmu.4910.en-de.hyp", "newstest2017.ref.de"]
    for name in names:
        (tmp_path / name).write_text("\n".join((folder / name).read_text().split("\n")[:300]) + "\n")
    for n, name in enumerate(names[:2]):
        words = ["--hypotheses", str(tmp_path / name), "--references", str(tmp_path / names[2]), "--bootstrap", "0"]
        call(capsys, "bleu", *words, "--out", str(tmp_path / f"e{n}"))
    page = (tmp_path / "e0" / "report.html").read_text()
    assert "The pairs</h2>" in page
    assert html.escape((tmp_path / names[2]).read_text().split("\n")[0]) in page  # beside what it is compared with
    words = ["--hypotheses", str(tmp_path / names[0]), "--references", str(tmp_path / names[2]), "--bootstrap", "1"]
    assert cli(["evaluate", "bleu", *words]) == 2
    ours = compare(tmp_path / "e0", tmp_path / "e1")["figures"]
    command = [sys.executable, "-m", "sacrebleu", names[2], "-i", *names[:2], "-m", "bleu", "chrf", "--paired-bs",
               "--paired-bs-n", "1000", "-w", "4", "-f", "text"]  # fmt: skip
    theirs = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    values = {key: [found["first"], found["second"]] for key, found in ours.items()}
    scores = [
        [float(x) for x in re.findall(r"(\d+\.\d{4}) \(", line)]
        for line in theirs.split("\n")
        if "│" in line and ".hyp" in line
    ]
    assert scores == [[pytest.approx(values[key][n], abs=1e-4) for key in ("bleu", "chrf")] for n in (0, 1)]
    p = [float(x) for x in re.findall(r"p = (\d\.\d+)", theirs)]
    assert p == [pytest.approx(ours[key]["p"], abs=1e-4) for key in ("bleu", "chrf")]
    assert json.loads(json.dumps(ours)) == ours


def test_colours_stand_on_their_tokens(folders: Path, tokenizer: Tokenizer) -> None:
    text = "def area(width):\n    return 骆驼 < 3  # Ω≈ç"
    model: Llama = load(folders / "m0")
    for bos in get_args(BosRule):
        _, [scored] = measured(model, tokenizer, [text], bos=bos, quiet=True)
        shown, spans = coloured(scored, tokenizer)
        assert shown == text
        assert all(a < b for a, b, _, _ in spans)
        assert all(x[1] <= y[0] for x, y in pairwise(spans))
        places = tokenizer.offsets(text)[len(scored.text.ids) - len(scored.nats) :]
        said = {(a, b): label for a, b, _, label in spans}
        for (_, start, end), nats in list(zip(places, scored.nats, strict=True))[:4]:
            assert f"{nats / math.log(2):.2f} bits" in said[start, end]


def test_shards_score_as_their_texts(folders: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    build([json.loads(line)["text"] for line in (folders / "d.jsonl").read_text().split("\n")], tokenizer,
          folders / "tokens", [])  # fmt: skip
    of_texts = call(capsys, "perplexity", str(folders / "m0"), "--data", str(folders / "d.jsonl"))
    of_shards = call(capsys, "perplexity", str(folders / "m0"), "--data", str(folders / "tokens"))
    for key in ("nats", "tokens", "bytes", "words"):
        assert of_texts[key] == pytest.approx(of_shards[key])


def test_a_card_says_what_records_say(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = call(
        capsys, "perplexity", str(folders / "m0"), "--data", str(folders / "d.jsonl"), "--out", str(folders / "e")
    )
    card = call(capsys, "card", str(folders / "m0"), str(folders / "e"))["card"]
    own = folders / "mine.md"
    own.write_text("My own words.")
    assert cli(["evaluate", "card", str(folders / "m0"), "--out", str(own)]) == 2
    assert own.read_text() == "My own words."
    for _ in range(2):  # a card is replaced by a card
        assert cli(["evaluate", "card", str(folders / "m0"), str(folders / "e"), "--out", str(folders / "c.md")]) == 0
    assert (folders / "c.md").read_text() == card
    capsys.readouterr()
    assert f"| perplexity [1] | bits_per_byte | {found['bits_per_byte']:.6g} |" in card
    assert found["protocol"] in card
    assert "| hidden_size | 32 |" in card
    with pytest.raises(InputError, match="another model"):
        make_card(str(folders / "m1"), [folders / "e"])
    (folders / "m0" / "camelid.json").unlink()  # as a folder from a hub: known by its weights
    with pytest.raises(InputError, match="other weights"):
        make_card(str(folders / "m0"), [folders / "e"])
    call(capsys, "perplexity", str(folders / "m0"), "--data", str(folders / "d.jsonl"), "--out", str(folders / "e"))
    assert make_card(str(folders / "m0"), [folders / "e"]).startswith(
        "---\nlibrary_name: camelid\ntags: [llama]\n---\n# m0\n"
    )
    model: Llama = load(folders / "m0")
    with torch.no_grad():
        model.norm.weight[0] += 1
    save(model, folders / "m0-changed")
    (folders / "m0-changed" / "model.safetensors").replace(folders / "m0" / "model.safetensors")
    with pytest.raises(InputError, match="other weights"):
        make_card(str(folders / "m0"), [folders / "e"])


def test_windows_and_rules_at_fault(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "perplexity", str(folders / "m0"), "--data", str(folders / "d.jsonl")]
    for wrong in ("--window 129", "--window 1", "--stride 0", "--window 8 --stride 9", "--batch 0"):
        assert cli([*words, *wrong.split()]) == 2
        assert wrong.split()[-2] in capsys.readouterr().err
    (folders / "empty.txt").write_text("")
    assert cli(["evaluate", "perplexity", str(folders / "m0"), "--data", str(folders / "empty.txt")]) == 2
    assert "no text" in capsys.readouterr().err
    (folders / "short.txt").write_text("short")
    found = call(capsys, "perplexity", str(folders / "m0"), "--data", str(folders / "short.txt"))
    assert "no document fills the window" in found["warning"]
