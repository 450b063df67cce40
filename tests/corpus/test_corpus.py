"""The corpus: every document and byte accounted for, the same for any number of workers, whole or not there."""

from __future__ import annotations

import contextlib
import gzip
import json
import lzma
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from camelid.artifact import read_manifest
from camelid.corpus import build, documents
from camelid.errors import InputError, RecipeError
from camelid.recipe import CorpusSection, load

from .test_rules import edited

LONG = "A sentence that is long enough to be kept by the filter, number {}."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.txt").write_text(LONG.format(1))
    (raw / "b.md").write_text(LONG.format(1) + "  \r\n")  # the same after repair
    (raw / "c.txt").write_text("short")
    (raw / "d.txt").write_bytes(b"\x00\x01\x02\xff\x00\x07" * 40)
    (raw / "e.jsonl").write_text(json.dumps({"text": LONG.format(2)}) + '\n{"no": 1}\nnot json\n\n')
    (raw / "f.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": LONG.format(3)}).encode()))
    (raw / "g.jsonl.gz").write_bytes(b"\x1f\x8bbroken")
    (raw / "h.csv").write_text(f'id,text\n1,"{LONG.format(4)}"\n2,too,many\n')
    (raw / ".hidden.txt").write_text(LONG.format(99))
    return raw


def made(folder: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return build([folder], out, CorpusSection(**{"workers": 1} | settings), quiet=True)


def balanced(tally: dict[str, Any]) -> bool:
    return bool(tally["read"] == tally["kept"] + sum(tally["dropped"].values()) + sum(tally["quarantined"].values()))


def test_every_document_and_byte_is_accounted_for(folder: Path, tmp_path: Path) -> None:
    result = made(folder, tmp_path / "out", deduplicate="exact")
    assert result["documents"] == {
        "read": 13, "kept": 4, "dropped": {"duplicate": 1, "too_short": 1, "blank_line": 1, "header": 1},
        "quarantined": {"no_text_field": 1, "bad_json": 1, "broken_gzip_member": 1, "binary": 1, "bad_csv": 1},
    }  # fmt: skip
    assert balanced(result["bytes"])
    plain = sum(p.stat().st_size for p in folder.glob("[a-eh]*.*")) + len(json.dumps({"text": LONG.format(3)}))
    assert result["bytes"]["read"] == plain + (folder / "g.jsonl.gz").stat().st_size
    assert list(documents(tmp_path / "out")) == [LONG.format(n) for n in (1, 2, 3, 4)]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_reason_of_no_bytes_is_accounted_for(folder: Path, tmp_path: Path) -> None:
    """A null in a parquet, the missing end of a compressed file: documents without bytes."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [LONG.format(5), None, ""]}), folder / "i.parquet")
    cut = lzma.compress(json.dumps({"text": LONG.format(6)}).encode())
    (folder / "j.jsonl.xz").write_bytes(cut[: len(cut) // 2])
    result = made(folder, tmp_path / "out")
    assert result["documents"]["quarantined"].keys() == result["bytes"]["quarantined"].keys()
    assert result["bytes"]["quarantined"]["broken_xz_stream"] == 0
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("how", ["exact", "near"])
def test_of_copies_the_first_one_stays(tmp_path: Path, how: str) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    copy = LONG.format(1) + ("" if how == "exact" else " One more word.")
    for name, content in {"a": LONG.format(1), "b": "Something else altogether. " * 20, "c": copy}.items():
        (raw / f"{name}.txt").write_text(content)
    result = made(raw, tmp_path / "out", deduplicate=how, filters=[])
    assert result["documents"]["kept"] == 2
    assert [text.split()[0] for text in documents(tmp_path / "out")] == [LONG.split()[0], "Something"]
    assert next(iter(documents(tmp_path / "out"))) == LONG.format(1)


def test_the_digest_is_of_the_text(folder: Path, tmp_path: Path) -> None:
    digests = [made(folder, tmp_path / name, deduplicate="exact")["digest"] for name in "ab"]
    (folder / "a.txt").write_text(LONG.format(9))
    assert digests[0] == digests[1] != made(folder, tmp_path / "c", deduplicate="exact")["digest"]


def test_a_corpus_is_an_input_too(folder: Path, tmp_path: Path) -> None:
    made(folder, tmp_path / "one", deduplicate="exact")
    made(tmp_path / "one" / "documents-00000.parquet", tmp_path / "two", deduplicate="exact")
    assert list(documents(tmp_path / "one")) == list(documents(tmp_path / "two"))


def test_of_a_corpus_folder_only_its_documents_are_read(folder: Path, tmp_path: Path) -> None:
    made(folder, tmp_path / "in" / "one", deduplicate="exact")
    (tmp_path / "in" / "one" / "mine.txt").write_text(LONG.format(7))
    kept = [*documents(tmp_path / "in" / "one"), LONG.format(7)]
    for place in (tmp_path / "in" / "one", tmp_path / "in"):
        made(place, tmp_path / "out", deduplicate="exact")
        assert list(documents(tmp_path / "out")) == kept


def test_made_where_one_stands(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    made(folder, Path("."), deduplicate="exact")
    assert len(list(documents(tmp_path / "here"))) == 4


def test_an_input_that_is_written_to_meanwhile(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from camelid.corpus import run

    def growing(unit: Any, *rest: Any) -> None:
        process(unit, *rest)
        with (folder / "a.txt").open("a") as file:
            file.write("more")

    process = run.process
    monkeypatch.setattr(run, "process", growing)
    with pytest.raises(InputError, match=r"changed while it was read: \S+a\.txt\. Build again"):
        made(folder, tmp_path / "out")
    monkeypatch.setattr(run, "process", process)
    made(folder, tmp_path / "out")
    assert LONG.format(1) + "more" in documents(tmp_path / "out")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of several units: JSON lines with copies, near copies and repeated lines."""
    raw = tmp_path_factory.mktemp("many")
    source = random.Random(3)
    words = [
        f"{a}{b}" for a in ("ba", "ke", "lo", "mi", "su", "ta", "ven") for b in ("n", "rd", "st", "ll", "mp", "ck")
    ]
    texts = [" ".join(source.choices(words, k=80)) + "." for _ in range(120)]
    for number in range(3):
        with (raw / f"{number}.jsonl").open("w") as file:
            for text in texts[number * 40 : number * 40 + 40]:
                near = text.replace(" ban ", " kerd ", 1)
                for one in (
                    text,
                    near,
                    text if source.random() < 0.2 else near + " End.",
                    "A shared closing line.\n" + text[:200],
                ):
                    print(json.dumps({"text": one}), file=file)
    return raw


SMALL_UNITS = "import camelid.corpus.unit as u; u.UNIT_BYTES = 20_000\n"


def test_workers_and_engines_make_the_same_corpus(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("camelid.corpus.unit.UNIT_BYTES", 20_000)
    results = [made(many, tmp_path / f"w{n}", workers=n, deduplicate_lines=True) for n in (1, 2, 4)]
    assert results[0]["documents"]["dropped"]["near_duplicate"] > 50
    for other in results[1:]:
        assert other["digest"] == results[0]["digest"]
        assert other["documents"] == results[0]["documents"]
    assert "A shared closing line." in "".join(documents(tmp_path / "w1"))
    assert "".join(documents(tmp_path / "w1")).count("A shared closing line.") == 1


def test_ray_makes_the_same_corpus(many: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the ray extra is not installed")
    assert made(many, tmp_path / "ray", engine="ray")["digest"] == made(many, tmp_path / "local")["digest"]


def test_what_is_alike_is_said_by_the_threshold(tmp_path: Path) -> None:
    """Pairs that share five of eight shingles: copies of one another at 0.4, and texts of their own at 0.7."""
    source, lines = np.random.default_rng(6), []
    for _ in range(40):
        words = [f"w{n}" for n in source.integers(0, 4000, 400)]
        lines += [words, edited(words, 0.62, source)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": " ".join(line)}) for line in lines))
    asked: dict[str, Any] = {"filters": [], "deduplicate": "near"}
    apart = made(tmp_path / "a.jsonl", tmp_path / "apart", **asked, near_threshold=0.7)
    assert apart["documents"]["kept"] == 80
    alike = made(tmp_path / "a.jsonl", tmp_path / "alike", **asked, near_threshold=0.4)
    assert alike["documents"]["dropped"]["near_duplicate"] > 15


def test_a_killed_run_goes_on_to_the_same_corpus(many: Path, tmp_path: Path) -> None:
    """kill -9 at random moments, on one output, until a run gets through."""

    def program(out: str) -> list[str]:
        build_it = f"build([{str(many)!r}], {str(tmp_path / out)!r}, CorpusSection(workers=1), quiet=True)"
        imports = "from camelid.corpus import build\nfrom camelid.recipe import CorpusSection\n"
        return [sys.executable, "-c", SMALL_UNITS + imports + build_it]

    subprocess.run(program("whole"), check=True)
    source = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(program("killed"))
        time.sleep(source.uniform(0.3, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    # Once more, amid the work: what is finished is not made again.
    units = tmp_path / ".killed.building"
    for _ in range(5):  # the work is short: it may be over before it is seen
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        process = subprocess.Popen(program("killed"))
        while not dict(finished_units(units)) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)
        before = dict(finished_units(units))
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL and before and not (tmp_path / "killed").exists():
            break
    assert before
    process, seen = subprocess.Popen(program("killed")), dict[str, int]()
    while process.poll() is None:
        seen.update(finished_units(units))
        time.sleep(0.002)
    assert process.wait() == 0
    # Some file systems still settle a file's time once it is there; one made again is a process's start younger.
    assert all(abs(seen.get(name, 0) - when) < 50e6 for name, when in before.items())
    whole, killed = read_manifest(tmp_path / "whole"), read_manifest(tmp_path / "killed")
    assert [killed[name] for name in ("digest", "documents")] == [whole[name] for name in ("digest", "documents")]


def finished_units(work: Path) -> Iterator[tuple[str, int]]:
    """Units whose part is done, and when it was."""
    with contextlib.suppress(FileNotFoundError):  # all of it goes when the corpus is whole
        for done in [*work.glob("*/done.json")]:
            yield done.parent.name, done.stat().st_mtime_ns


def test_real_text(data: Path, tmp_path: Path) -> None:
    result = build([data / "corpora" / "c4_demo.jsonl", data / "corpora" / "zh"], tmp_path / "out", quiet=True)
    assert balanced(result["documents"])
    assert balanced(result["bytes"])
    assert result["documents"]["kept"] >= 5000
    assert "林黛玉" in "".join(documents(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "near_duplicate" in page
    assert "documents read = " in (tmp_path / "out" / "README.md").read_text()


def test_web_archives(data: Path, tmp_path: Path) -> None:
    result = build([data / "web" / "warc"], tmp_path / "out", quiet=True)
    assert balanced(result["bytes"])
    assert result["documents"]["quarantined"] == {"bad_content_length": 2, "bad_warc_header": 1}


def test_decontamination_and_its_warning(folder: Path, tmp_path: Path) -> None:
    from camelid.corpus.decontaminate import unchecked

    sentence = " ".join(f"word{n}" for n in range(20))
    (folder / "leak.txt").write_text("Before it comes something else. " + sentence.upper() + " And after it too.")
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": sentence}) + "\n")
    result = made(folder, tmp_path / "out", decontaminate=[str(tmp_path / "test.jsonl")])
    assert result["documents"]["dropped"]["contaminated:test.jsonl"] == 1
    assert unchecked(tmp_path / "out", [tmp_path / "test.jsonl"]) is None
    assert "not decontaminated" in str(unchecked(tmp_path / "out", [folder / "a.txt"]))
    [checked] = read_manifest(tmp_path / "out")["decontaminated"]
    assert (checked["texts"], checked["too_short"]) == (1, 0)


def test_texts_that_are_too_short_to_look_for_are_told(folder: Path, tmp_path: Path) -> None:
    questions = [" ".join(f"word{n}" for n in range(20)), "who is it", "and why"]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"q": q}) + "\n" for q in questions))
    made(folder, tmp_path / "out", decontaminate=[str(tmp_path / "test.jsonl")])
    assert "test.jsonl (but for 2 of its 3 texts" in (tmp_path / "out" / "README.md").read_text()


def test_a_corpus_that_was_built_again_says_nothing_of_an_older_model(folder: Path, tmp_path: Path) -> None:
    from camelid.artifact import new_folder, write_manifest
    from camelid.corpus.decontaminate import unchecked

    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"question": " ".join(f"word{n}" for n in range(20))}) + "\n")
    made(folder, tmp_path / "out")
    with new_folder(tmp_path / "model", "model") as model:
        write_manifest(model, "model", [tmp_path / "out"])
    assert "not decontaminated" in str(unchecked(tmp_path / "model", [test]))
    made(folder, tmp_path / "out", decontaminate=[str(test)])
    assert "is not the one" in str(unchecked(tmp_path / "model", [test]))
    shutil.rmtree(tmp_path / "out")
    assert unchecked(tmp_path / "model", [test]) is None


def test_sets_that_changed_are_read_again(tmp_path: Path) -> None:
    told = {name: " ".join(f"{name}{n}" for n in range(20)) for name in "pq"}
    (tmp_path / "raw").mkdir()
    for name, sentence in told.items():
        (tmp_path / "raw" / f"{name}.txt").write_text(f"Before it comes something else. {sentence} And after it too.")
    for name in ("q", "p"):
        (tmp_path / "eval.txt").write_text(told[name])
        made(tmp_path / "raw", tmp_path / "out", decontaminate=[str(tmp_path / "eval.txt")])
        [kept] = documents(tmp_path / "out")
        assert told[name] not in kept
    (tmp_path / "eval.jsonl.gz").write_bytes(
        gzip.compress(json.dumps({"q": "\u2028 " + told["q"]}, ensure_ascii=False).encode())
    )
    result = made(tmp_path / "raw", tmp_path / "out", decontaminate=[str(tmp_path / "eval.jsonl.gz")])
    assert result["documents"]["dropped"] == {"contaminated:eval.jsonl.gz": 1}


def test_a_line_is_lost_only_where_another_holds_it(tmp_path: Path) -> None:
    """Its first holder was dropped as a copy."""
    (tmp_path / "raw").mkdir()
    same, line = (
        "\n".join(f"Line {n} of a long document, which says {n * n}." for n in range(60)),
        "A line of its own, told twice.",
    )
    for name, text in (("a", same), ("b", f"{same}\n{line}"), ("c", f"{line}\n" + LONG.format(3))):
        (tmp_path / "raw" / f"{name}.txt").write_text(text)
    result = made(tmp_path / "raw", tmp_path / "out", deduplicate_lines=True)
    assert result["documents"]["dropped"] == {"near_duplicate": 1}
    assert sum(line in text for text in documents(tmp_path / "out")) == 1


def test_a_mixture_counts_sources_by_epochs_and_weights(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mix.toml"
    recipe.write_text(
        '[corpus]\nworkers = 1\ndeduplicate = "exact"\n'
        f'[[corpus.sources]]\nname = "one"\ninputs = ["{folder}/a.txt"]\nepochs = 2.0\n'
        f'[[corpus.sources]]\nname = "two"\ninputs = ["{folder}/e.jsonl"]\n'
    )
    build([], tmp_path / "out", load(recipe).corpus, quiet=True)
    assert list(documents(tmp_path / "out")) == [LONG.format(1)] * 2 + [LONG.format(2)]
    weighted = recipe.read_text().replace("epochs = 2.0", "weight = 3").replace('"two"', '"two"\nweight = 1')
    recipe.write_text(weighted)
    build([], tmp_path / "out", load(recipe).corpus, quiet=True)
    shares = {n: row["share"] for n, row in read_manifest(tmp_path / "out")["mixture"].items()}
    assert shares == {"one": 0.75, "two": 0.25}


def test_text_unlike_the_reference_is_dropped(data: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    source = random.Random(1)
    (raw / "noise.txt").write_text("".join(source.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(3000)))
    prose, *others = (data / "corpora" / "wiki_demo.txt").read_text().split("\n")
    (raw / "prose.txt").write_text(prose[:5000])
    reference = tmp_path / "reference.txt"
    reference.write_text("\n".join(others))
    result = made(raw, tmp_path / "out", perplexity_reference=[str(reference)], max_perplexity_quantile=1.0)
    assert result["documents"]["dropped"] == {"perplexity": 1}
    assert next(documents(tmp_path / "out")).startswith(prose[:50])
    assert str(reference) in {entry["path"] for entry in read_manifest(tmp_path / "out")["inputs"]}


def test_the_reference_is_text_not_markup(tmp_path: Path) -> None:
    from camelid.corpus.ngram import NgramModel, train_on_files

    said = [f"<p>{LONG.format(n)} Camels walk far and drink seldom.</p>" for n in range(4000)]
    (tmp_path / "page.html").write_text("<html><body><article>" + "\n".join(said) + "</article></body></html>")
    train_on_files([str(tmp_path / "page.html")], tmp_path / "ngram.npz", 1.0)
    model = NgramModel.load(tmp_path / "ngram.npz")
    text, markup = model.perplexities([LONG.format(17), '<p class="x"><div></div></p>' * 4])
    assert text < model.limit * 2 < markup


@pytest.mark.parametrize("name", ["missing", "missing/*.txt"])
def test_inputs_that_name_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=name.replace("*", r"\*").replace(".", r"\.")):
        made(tmp_path / name, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_kept_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(InputError, match="too_short"):
        made(tmp_path / "a.txt", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("corpus.min_charcters=3", "did you mean 'min_characters'"),
        ("corpus.near_threshold=7", "near_threshold"),
        ("corpus.filters=golfer", "golfer"),
        ("corpus.limits.golfer=1", "golfer"),
        ("corpus.decontaminate=bad.jsonl", "bad.jsonl is not JSON"),
    ],
)
def test_settings_that_cannot_be(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text("not json\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((RecipeError, InputError), match=message):
        build([folder], tmp_path / "out", load(None, [setting]).corpus, quiet=True)
