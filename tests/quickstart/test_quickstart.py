"""The quickstart: an honest hold-out, baselines that do what they say, and a small life from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from camelid.artifact import damage, new_folder, write_manifest
from camelid.errors import CamelidError, InputError, MissingExtra
from camelid.quickstart import life, source
from camelid.quickstart.baselines import Nearest, name_as_words
from camelid.quickstart.source import Pair

MODULE = '''
def read_{0}(path, size):
    """Read {0} records from the file at path."""
    with open(path) as file:
        return file.read(size)


class C{0}:
    def getHTTP{0}(self):
        """Return the HTTP {0} of the {0} request.

        Second paragraph.
        """
        return self.{0}


def undocumented():
    return 1
'''
NAMES = ["cat", "dog", "cow", "hen", "fox", "owl", "ant", "bee", "eel", "yak", "emu", "cod"]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    for name in NAMES:
        (root / name).mkdir(parents=True)
        (root / name / "a.py").write_text(MODULE.format(name))
        (root / name / "b.py").write_text("\n".join(f"{name}_{i} = {i}  # constant of {name}" for i in range(40)))
    (root / "site-packages").mkdir()
    (root / "site-packages" / "other.py").write_text(MODULE.format("other"))
    return root


def test_whole_modules_are_held_out(library: Path) -> None:
    files = source.find_sources(library)
    assert not [p for p in files if "site-packages" in p.parts]
    train, held = source.split(files, library, seed=1, held_out_bytes=5000)
    assert held
    assert sorted(train + held) == files
    assert not {source.module_of(p, library) for p in train} & {source.module_of(p, library) for p in held}


def test_real_library_splits_without_overlap() -> None:
    root = source.standard_library()
    files = source.find_sources(root)
    train, held = source.split(files, root, life.SEED)
    assert not {source.module_of(p, root) for p in train} & {source.module_of(p, root) for p in held}
    assert source.HELD_OUT_BYTES <= sum(p.stat().st_size for p in held) < 2 * source.HELD_OUT_BYTES
    seen = source.pairs(train)
    judged = source.unseen(source.pairs(held), seen)
    assert len(judged) > 50
    assert not {p.docstring.lower() for p in judged} & {p.docstring.lower() for p in seen}


def test_pairs_do_not_leak_the_docstring(library: Path) -> None:
    found = source.pairs([library / "cat" / "a.py"])
    assert [p.name for p in found] == ["read_cat", "getHTTPcat"]
    assert found[0].docstring == "Read cat records from the file at path."
    assert found[1].docstring == "Return the HTTP cat of the cat request."
    for pair in found:
        assert pair.docstring not in pair.code
        assert '"""' not in pair.code
    assert found[0].code.startswith("def read_cat(path, size):\n    with open(path)")


def test_baselines() -> None:
    def pair(name: str, docstring: str = "") -> Pair:
        return Pair(name, f"def {name}(self):\n    return self.{name}", docstring, "")

    assert name_as_words(pair("getHTTPResponse_code")) == "Get http response code."
    nearest = Nearest(
        [pair("read_file", "Read a file."), pair("close_socket", "Close it."), pair("parse_date", "Parse.")]
    )
    assert nearest(pair("socket_close")) == "Close it."


def test_a_small_life(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "standard_library", lambda: library)
    monkeypatch.setattr(life, "VOCAB_SIZE", 350)
    monkeypatch.setattr(
        life, "SHAPE", life.SHAPE | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    )
    monkeypatch.setattr(source, "HELD_OUT_BYTES", 5000)
    monkeypatch.setattr(source.split, "__defaults__", (5000,))
    result = life.run(tmp_path / "qs", minutes=0.02, quiet=True)
    page = (tmp_path / "qs" / "report.html").read_text()
    assert "xz -9" in page
    assert "<svg" in page
    assert "http://" not in page
    assert "https://" not in page
    assert set(result["docstrings"]["scores"]) == {
        "fine-tuned model",
        "nearest training docstring",
        "function name as words",
    }
    manifest = json.loads((tmp_path / "qs" / "camelid.json").read_text())
    assert manifest["kind"] == "quickstart"
    (tmp_path / "qs" / "notes.txt").write_text("a person's")
    life.run(tmp_path / "qs", minutes=0.02, quiet=True)  # again, over the old one, beside what is not its own
    (tmp_path / "qs" / "notes.txt").write_text("and changed")
    assert damage(tmp_path / "qs") is None


@pytest.mark.parametrize(
    ("by", "raised", "stage"), [("SIGINT", KeyboardInterrupt, "pretrain"), ("SIGTERM", CamelidError, "finetune")]
)
def test_a_run_that_was_stopped_is_told_and_not_measured(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str, raised: type[BaseException], stage: str
) -> None:
    monkeypatch.setattr(life, "standard_library", lambda: library)
    monkeypatch.setattr(life, "VOCAB_SIZE", 350)
    monkeypatch.setattr(source.split, "__defaults__", (5000,))
    for name in ("compression", "docstrings", "sample"):
        monkeypatch.setattr(life, f"_{name}", lambda *_: {})
    for room, name in (("train", "pretrain"), ("finetune", "finetune")):
        result = {"checkpoint": "base", "steps": 3, **({"stopped_by": by} if name == stage else {})}
        monkeypatch.setattr(f"camelid.{room}.{name}", lambda *_, result=result, **__: result)
    with pytest.raises(raised):
        life.run(tmp_path / "qs", minutes=0.02, quiet=True)
    assert not (tmp_path / "qs" / "camelid.json").exists()
    assert not (tmp_path / "qs" / "report.html").exists()


def test_an_earlier_one_is_replaced_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from within, through a link, and where something of a person's lies beside it."""
    place, link = tmp_path / "place", tmp_path / "link"
    (place / "base" / "checkpoints").mkdir(parents=True)
    for name in (".quickstart", "results.json", "notes.txt"):
        (place / name).touch()
    (place / ".tokens.a1b2").mkdir()
    link.symlink_to(place)
    monkeypatch.chdir(place)
    for out in (Path(), link):
        life._fresh(out.resolve())
        assert sorted(p.name for p in place.iterdir()) == [".quickstart", "notes.txt"]


def test_a_missing_package_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "find_spec", lambda name: None if name == "nltk" else object())
    with pytest.raises(MissingExtra, match="nltk"):
        life.run(tmp_path / "out", minutes=1)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(InputError, match="not a quickstart"):
        life.run(tmp_path, minutes=1)
    assert (tmp_path / "thesis.txt").exists()
    with new_folder(tmp_path / "model", "model") as folder:
        write_manifest(folder, "model")
    for other, why in ((tmp_path / "model", "not a quickstart"), (tmp_path / "thesis.txt", "is a file")):
        with pytest.raises(InputError, match=why):
            life.run(other, minutes=1)
    assert damage(tmp_path / "model") is None
