"""Recipes: errors name the key, its line and the nearest valid key; overrides; the recipes we ship."""

from __future__ import annotations

from pathlib import Path

import pytest

from camelid.errors import InputError, RecipeError
from camelid.recipe import load, parse

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
GOOD = '[model]\nsize = "1m"\n\n[train]\nsteps = 10\nlearning_rate = 1e-3\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "r.toml").write_text(GOOD)
    return tmp_path / "r.toml"


def test_overrides(file: Path) -> None:
    recipe = load(file, ["train.steps=40", "log.out=runs/b", "train.learning_rate=1", 'data.files=["a", "b"]'])
    assert (recipe.train.steps, recipe.log.out, recipe.train.learning_rate) == (40, "runs/b", 1.0)
    assert recipe.data.files == ["a", "b"]
    assert recipe.model.size == "1m"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("stepps = 10", r"line 7: unknown key 'train\.stepps'; did you mean 'steps'"),
        ('sequence_length = "long"', r"line 7: train\.sequence_length is 'long'"),
        ("warmup_steps = -1", r"line 7: train\.warmup_steps is -1: .*greater than or equal to 0"),
        ("[trian]", r"unknown key 'trian'; did you mean 'train'"),
        ("= 4", "not TOML"),
        (
            '[[corpus.sources]]\nname = "a"\ninputs = []\n[[corpus.sources]]\nname = "b"\ninputs = []\nweight = 0',
            "line 13: .*weight is 0",
        ),
        ('[[corpus.sources]]\nname = "a"\ninputs = []\nwieght = 1', r"line 10: .*wieght'; did you mean 'weight'"),
        ('[[corpus.sources]]\nname = "a"', r"line 7: corpus\.sources\.0\.inputs"),
        ('[corpus]\nsources = [{name = "a"}]', r"line 8: corpus\.sources\.0\.inputs"),
    ],
)
def test_errors_name_key_line_and_fix(file: Path, line: str, says: str) -> None:
    file.write_text(GOOD + line + "\n")
    with pytest.raises(RecipeError, match=says):
        load(file)


def test_override_errors(file: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'every'"):
        load(file, ["checkpoint.evry=3"])
    with pytest.raises(RecipeError, match=r"section\.key=value"):
        load(file, ["steps"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps=abc", r"^[^,]*: train\.steps is 'abc'"),  # no line: it is not the file's
        ("data.tokens=5", r"^[^,]*: data\.tokens is 5"),
        ("corpus.languages=en,english", "'english' is no ISO 639 code"),
    ],
)
def test_overrides_are_told_as_they_were_given(file: Path, override: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(file, [override])


def test_words_are_easy_to_type(file: Path) -> None:
    read = load(file, ["corpus.languages=en, zh", "data.files=a.jsonl", "log.out=2026-11-26"])
    assert read.corpus.languages == ["en", "zh"]
    assert read.data.files == ["a.jsonl"]
    assert read.log.out == "2026-11-26"


def test_a_run_has_one_length(file: Path) -> None:
    assert load(file, ["train.epochs=3"]).train.model_dump(include={"steps", "epochs"}) == {"steps": None, "epochs": 3}
    with pytest.raises(RecipeError, match=r"^[^,]*: train: steps and minutes each say how long to train: keep one"):
        load(file, ["train.steps=3", "train.minutes=2"])
    file.write_text(GOOD + "epochs = 2\n")
    with pytest.raises(RecipeError, match="steps and epochs each say"):
        load(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no recipe at"):
        load(tmp_path / "none.toml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert load(path).settings()


def test_a_recipe_survives_its_own_manifest() -> None:
    recipe = parse({"model": {"from": "x"}, "train": {"steps": 3}})
    assert parse(recipe.settings()) == recipe


def test_the_papers_mixture_adds_up() -> None:
    """LLaMA paper, table 1."""
    path = Path(__file__).parent.parent / "recipes" / "llama-mixture.toml"
    weights = {s.name: s.weight for s in load(path).corpus.sources}
    assert sum(w for w in weights.values() if w) == pytest.approx(100)
    assert weights["commoncrawl"] == 67.0


def test_a_key_that_the_method_ignores_is_refused(tmp_path: Path) -> None:
    """Even at its default: `bits = 4` beside lora is a wish for qlora."""
    for given, said in (
        ('method = "lora"\nbits = 4', "finetune.bits is for qlora, and lora ignores it"),
        ('method = "dpo"\nmargin = 0.2', "finetune.margin is for simpo, and dpo ignores it"),
        ("rank = 8", "finetune.rank is for lora or dora or qlora, and full ignores it"),
        ("temperature = 0.7", "finetune.temperature is for grpo, and full ignores it"),
    ):
        (tmp_path / "a.toml").write_text(f"[finetune]\n{given}\n")
        with pytest.raises(RecipeError, match=said):
            load(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text('[finetune]\nmethod = "lora"\nrank = 8\n')
    assert load(tmp_path / "a.toml", ["finetune.method=full"]).finetune is not None  # the file's rank is put away
    for settings in (["finetune.method=full", "finetune.rank=4"], ["finetune.beta=0.5"]):
        with pytest.raises(RecipeError, match="ignores it"):
            load(tmp_path / "a.toml", settings)
    (tmp_path / "a.toml").write_text('[finetune]\nmethod = "kto"\nadapter = "qlora"\nbits = 8\nbeta = 0.3\n')
    kept = load(tmp_path / "a.toml")
    assert parse(kept.settings()) == kept  # a manifest holds every key


def test_a_key_of_training_that_nothing_heeds_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    for given, said in (
        ("decay_share = 0.2", "is for train.schedule wsd, and cosine ignores it"),
        ("muon_learning_rate = 0.01", "is for train.optimizer muon, and adamw ignores it"),
    ):
        file.write_text(f"[train]\n{given}\n")
        with pytest.raises(RecipeError, match=said):
            load(file)
    file.write_text('[train]\nschedule = "wsd"\ndecay_share = 0.3\n')
    assert load(file, ["train.schedule=cosine"]).train.decay_share == 0.3  # the file's is put away
    with pytest.raises(RecipeError, match="cosine ignores it"):
        load(file, ["train.schedule=cosine", "train.decay_share=0.1"])


@pytest.mark.parametrize("setting", ["train.epochs=inf", "train.minutes=inf", "train.learning_rate=nan"])
def test_what_is_no_number_is_refused(file: Path, setting: str) -> None:
    with pytest.raises(RecipeError, match="finite number"):
        load(file, [setting])


def test_a_size_takes_the_place_of_the_files_shape(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('[model]\nfrom = "x"\nhidden_size = 64\nnum_hidden_layers = 2\nrope_theta = 5.0\n')
    assert load(file, ["model.size=1m"]).model.shape() == {"rope_theta": 5.0}
    assert load(file, ["model.size=1m", "model.hidden_size=128"]).model.hidden_size == 128
    assert load(file, ["model.size=1m"]).model.from_ == "x"
    assert load(file, ["model.hidden_size=128"]).model.num_hidden_layers == 2


def test_recipes_that_come_with_camelid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = load(ROOT / "recipes" / "small.toml")
    for name in ("small", "small.toml", "recipes/small.toml"):
        assert load(name) == wanted
    for name in ("smal", "elsewhere/small.toml", "../small.toml"):
        with pytest.raises(InputError, match=r"none that comes with camelid \(chat, code, dpo"):
            load(name)
    (tmp_path / "small.toml").write_text("[train]\nsteps = 7\n")  # one's own comes first
    assert load("small.toml").train.steps == 7
    assert load("recipes/small.toml") == wanted
