"""Hugging Face folders: round trip, shards, transformers reading ours, and hostile or broken folders."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from camelid.errors import FormatError, InputError
from camelid.formats import load, save
from camelid.formats.checkpoint import named_weights
from camelid.formats.hf import dtype_named
from camelid.formats.load import open_model, stop_ids
from camelid.model.llama import Llama


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_round_trip_is_bit_exact(model: Llama, tmp_path: Path, max_shard_bytes: int) -> None:
    save(model, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    again = load(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == (max_shard_bytes == 20_000)
    for (name, a), (other, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_transformers_opens_what_we_write(model: Llama, tmp_path: Path, max_shard_bytes: int) -> None:
    transformers = pytest.importorskip("transformers")
    save(model.float(), tmp_path / "m", max_shard_bytes=max_shard_bytes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert (theirs(ids).logits - model(ids).logits).abs().max() < 1e-5


def test_what_ends_a_text_is_the_generation_configs(model: Llama, tmp_path: Path) -> None:
    save(model, tmp_path / "m", generation={"eos_token_id": [3, 5], "temperature": 0.5})
    opened = open_model(tmp_path / "m")
    assert opened.generation == {"bos_token_id": 1, "eos_token_id": [3, 5], "temperature": 0.5}
    assert stop_ids(tmp_path / "m") == (3, 5)
    (tmp_path / "m" / "generation_config.json").unlink()
    assert open_model(tmp_path / "m").generation == {}


def test_names_of_number_formats() -> None:
    assert dtype_named("bfloat16") is torch.bfloat16
    with pytest.raises(InputError, match="no dtype 'int8'; choose one of float32"):
        dtype_named("int8")


def test_a_folder_of_someone_else_is_never_replaced(model: Llama, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not an output of camelid"):
        save(model, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_crash_while_saving_leaves_the_old_model(
    model: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(model, tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("camelid.formats.hf.write_weights", fail)
    with pytest.raises(OSError, match="disk full"):
        save(model, tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.fixture
def saved(model: Llama, tmp_path: Path) -> Path:
    save(model, tmp_path / "m", max_shard_bytes=20_000)
    return tmp_path / "m"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_truncated_safetensors(saved: Path) -> None:
    shard = sorted(saved.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(FormatError, match=f"{shard.name} is truncated"):
        load(saved)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_a_shard_path_may_not_leave_the_folder(saved: Path, name: str) -> None:
    (saved.parent / "secret.safetensors").write_bytes(b"x")
    edit(saved / "model.safetensors.index.json", weight_map={"model.norm.weight": name})
    with pytest.raises(FormatError, match="plain file name"):
        load(saved)


def test_a_shard_may_not_be_a_link_out_of_the_folder(saved: Path) -> None:
    shard = sorted(saved.glob("*.safetensors"))[0]
    outside = saved.parent / "outside.safetensors"
    shard.rename(outside)
    os.symlink(outside, shard)
    with pytest.raises(FormatError, match="leaves the model folder"):
        load(saved)


def test_missing_shard(saved: Path) -> None:
    sorted(saved.glob("*.safetensors"))[0].unlink()
    with pytest.raises(FormatError, match="download is incomplete"):
        load(saved)


def test_missing_tensor(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    weight_map = json.loads((saved / "model.safetensors.index.json").read_text())["weight_map"]
    shard = saved / weight_map["model.norm.weight"]
    tensors = load_file(shard)
    tensors.pop("model.norm.weight")
    save_file(tensors, shard)
    with pytest.raises(FormatError, match=r"norm\.weight"):
        load(saved)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_a_tied_embedding(model: Llama, tmp_path: Path, same: bool) -> None:
    """Some programs would use it, and others not."""
    save(model, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    if same:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    edit(tmp_path / "m" / "config.json", tie_word_embeddings=True)
    for read in (load, lambda folder: named_weights(open_model(folder))):
        if same:
            read(tmp_path / "m")
        else:
            with pytest.raises(FormatError, match=r"true, but lm_head\.weight is not the embedding"):
                read(tmp_path / "m")


def test_wrong_shape(saved: Path) -> None:
    edit(saved / "config.json", intermediate_size=64)
    with pytest.raises(FormatError, match=r"shape \[48, 32\], the config says \[64, 32\]"):
        load(saved)


@pytest.mark.parametrize("name", ["nowhere", "org/name"])
def test_missing_model(name: str) -> None:
    with pytest.raises(InputError, match=f"no model at {name}"):
        load(name)


def test_wrong_folder(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").touch()
    with pytest.raises(InputError, match="neither config"):
        load(tmp_path)
