"""Hub ids, in a cache like the hub's own and without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from camelid.artifact import read_manifest
from camelid.cli import run
from camelid.corpus import build
from camelid.errors import InputError
from camelid.formats.adapter import base_of, write_adapter
from camelid.formats.hf import save
from camelid.formats.hub import is_hub_id
from camelid.formats.load import load, load_tokenizer, resolve
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.lora import LoraConfig, adapt
from camelid.tokenizer.tokenizer import Tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One model, org/small, as the hub's cache keeps it: links into blobs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    save(Llama(config), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    home = tmp_path / "cache" / "models--org--small"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots" / COMMIT).mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    for n, file in enumerate(sorted((tmp_path / "model").iterdir())):
        file.rename(home / "blobs" / str(n))
        (home / "snapshots" / COMMIT / file.name).symlink_to(home / "blobs" / str(n))
    return tmp_path


def patched(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    import huggingface_hub

    real: Any = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download",
        lambda name, **given: real(name, **given, cache_dir=cache / "cache", local_files_only=True),
    )  # fmt: skip


def test_an_id_is_its_folder_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, cache)
    assert resolve("org/small").name == COMMIT
    assert resolve(f"org/small@{COMMIT}") == resolve("org/small@main")
    model: Llama = load("org/small")
    assert model.num_parameters() > 0
    assert len(load_tokenizer("org/small")) == model.config.vocab_size
    with torch.inference_mode():
        assert model(torch.tensor([[1, 2]])).logits.shape[1] == 2


def test_tokens_and_more_words_by_an_id(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest names the folder in the cache, and weights that are there grow."""
    patched(monkeypatch, cache)
    (cache / "raw.txt").write_text(
        "".join(f"第{n}只骆驼在沙漠里走，白天热，夜里冷。水在{n * n}里外。\n" for n in range(40))
    )
    build([cache / "raw.txt"], cache / "corpus", quiet=True)
    corpus = str(cache / "corpus")
    assert run(["tokens", "build", corpus, "--tokenizer", "org/small", "--out", str(cache / "tokens")]) == 0
    assert read_manifest(cache / "tokens")["inputs"][1]["path"] == str(resolve("org/small"))
    assert run(["tokenizer", "extend", "org/small", corpus, "--pieces", "4", "--out", str(cache / "x")]) == 0
    model: Llama = load(cache / "x")
    assert model.config.vocab_size > len(load_tokenizer("org/small"))
    monkeypatch.setenv("HOME", str(cache))
    assert run(["tokens", "build", corpus, "--tokenizer=~/x", "--out", str(cache / "again")]) == 0


def test_what_is_not_there(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    patched(monkeypatch, cache)
    with pytest.raises(InputError, match=r"no model at org/other.*not in the hub's cache"):
        resolve("org/other")
    assert run(["generate", "org/other", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    for path in ("no/such/folder", "./missing", "missing.gguf", "/tmp/nothing-here"):
        with pytest.raises(InputError, match="no such file"):
            resolve(path)


@pytest.mark.parametrize(
    ("source", "expected"),
    [("meta-llama/Llama-3.2-1B", True), ("org/name@main", True), ("org/name@refs/pr/1", True), ("name", False),
     ("a/b/c", False), ("../up", False), ("org/na me", False), ("", False),
     ("runs/sft", False), ("models/smollm2", False), ("out/chat", False)],
)  # fmt: skip
def test_what_looks_like_an_id(source: str, expected: bool) -> None:
    assert is_hub_id(source) is expected


def test_an_adapters_base_may_be_an_id(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, cache)
    base: Llama = load("org/small")
    config = LoraConfig(r=2, target_modules=("q_proj",))
    adapt(base, config, "default")
    weights = {name: p for name, p in base.named_parameters() if p.requires_grad}
    (cache / "adapter").mkdir()
    write_adapter(config, weights, cache / "adapter", resolve("org/small"), {})
    described = json.loads((cache / "adapter" / "adapter_config.json").read_text())
    for revision in (None, COMMIT):
        named = {"base_model_name_or_path": "org/small", "revision": revision}
        (cache / "adapter" / "adapter_config.json").write_text(json.dumps(described | named))
        assert base_of(cache / "adapter") == resolve("org/small")
        assert load(cache / "adapter").active_adapter == "default"
    load_tokenizer("org/small").save(cache / "adapter")
    with monkeypatch.context() as alone:  # a tokenizer that lies here needs no base
        looked: list[bool] = []
        alone.setattr("camelid.formats.adapter.snapshot", lambda name, here: (looked.append(here), resolve(name))[1])
        load_tokenizer(cache / "adapter")
        assert looked == [True]  # into the cache, and no further
    monkeypatch.chdir(cache)
    (cache / "org").mkdir()  # where a folder was renamed, nobody else's model is taken
    with pytest.raises(InputError, match="the base model 'org/small' is not here"):
        base_of(cache / "adapter")
