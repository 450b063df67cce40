"""Conversion goes tensor by tensor: how much memory it takes, and what it refuses before it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from camelid.artifact import lineage
from camelid.errors import FormatError
from camelid.formats import hf
from camelid.formats.convert import convert
from camelid.formats.load import load, open_model
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.tokenizer.load import from_folder
from camelid.tokenizer.tokenizer import Tokenizer

MIB = 2**20
# The most memory that this process held while it converted, beyond what it held before: what the kernel counts as
# resident, pages of mapped files among them. Files of settings and libraries are opened by a first, tiny conversion.
CHILD = """
import json, re, sys
from camelid.formats.convert import convert
tiny, source, out, to, shards = sys.argv[1:]
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status", encoding="utf-8").read())[1]) * 1024
convert(tiny, out + "-tiny" + (".gguf" if to == "gguf" else ""), to)
open("/proc/self/clear_refs", "w", encoding="utf-8").write("5")
before = peak()
convert(source, out, to, int(shards))
print(json.dumps(peak() - before))
"""


@pytest.fixture(scope="module")
def large(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of 460 MiB in files of 48 MiB, its largest tensor of 16 MiB, and a tiny one."""
    folder = tmp_path_factory.mktemp("large")
    for name, layers, width in (("tiny", 1, 64), ("large", 9, 1024)):
        config = LlamaConfig(
            vocab_size=4096, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=16, max_position_embeddings=4096,
        )  # fmt: skip
        model = Llama(config).to(torch.float16)
        (folder / name).mkdir()
        hf.write_weights(config, dict(model.named_parameters()), folder / name, max_shard_bytes=48 * MIB)
        from_folder(tokenizers["byte-level"]).save(folder / name)
    return folder / "tiny", folder / "large"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of memory is read from /proc")
@pytest.mark.parametrize("to", ["hf", "meta", "gguf"])
def test_memory_is_one_file_and_a_few_tensors(large: tuple[Path, Path], tmp_path: Path, to: str) -> None:
    tiny, source = large
    total = sum(p.stat().st_size for p in source.iterdir())
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    words = [sys.executable, "-c", CHILD, str(tiny), str(source), str(out), to, "2" if to == "meta" else "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    largest = 8 * MIB
    assert total > 280 * MIB
    assert json.loads(done.stdout) < 48 * MIB + 4 * largest


def test_the_same_weights_as_loading_gives(large: tuple[Path, Path], tmp_path: Path) -> None:
    convert(large[1], tmp_path / "meta", "meta", 2)
    convert(tmp_path / "meta", tmp_path / "back", "hf")
    convert(tmp_path / "back", tmp_path / "x.gguf", "gguf")
    first: Llama = load(large[1])
    for copy in ("meta", "back", "x.gguf"):
        again: Llama = load(tmp_path / copy, dtype=torch.float16)
        assert all(torch.equal(t, again.state_dict()[name]) for name, t in first.state_dict().items())


@pytest.mark.parametrize("fault", ["missing", "strange", "shape", "twice"])
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tokenizer: Tokenizer, tmp_path: Path, fault: str
) -> None:
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    tensors = dict(Llama(config).named_parameters())
    words = {"missing": "is missing", "strange": "does not belong", "shape": "has shape", "twice": "twice"}[fault]
    name = "layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "strange":
        tensors["layers.7.mlp.up_proj.weight"] = tensors[name]
    elif fault == "shape":
        tensors[name] = torch.nn.Parameter(torch.zeros(64, 128))
    model = tmp_path / "model"
    model.mkdir()
    hf.write_weights(config, tensors, model, max_shard_bytes=100_000)
    tokenizer.save(model)
    if fault == "twice":
        index = json.loads((model / "model.safetensors.index.json").read_text())
        index["weight_map"]["again"] = "again.safetensors"
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        (model / "again.safetensors").write_bytes((model / index["weight_map"][f"model.{name}"]).read_bytes())
    for to in ("hf", "meta", "gguf"):
        with pytest.raises(FormatError, match=words):
            convert(model, tmp_path / "out", to)
        assert not list(tmp_path.glob("*out*"))
    assert open_model(model).config == config


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_weights_that_are_no_floating_point_numbers(
    tokenizer: Tokenizer, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    from safetensors.torch import load_file, save_file

    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    hf.save(Llama(config), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(128, 64, dtype=torch.int8)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(FormatError, match=r"up_proj\.weight' holds int8"):
        load(tmp_path / "model", dtype=dtype)
    with pytest.raises(FormatError, match=r"up_proj\.weight' holds int8"):
        convert(tmp_path / "model", tmp_path / "out")


def test_a_model_in_the_place_of_what_it_was_made_from(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Its origin is gone, which its lineage tells."""
    folder = tmp_path / "m"
    hf.save(Llama(LlamaConfig(len(tokenizer), 32, 32, 1, 1)), folder)
    tokenizer.save(folder)
    convert(folder, folder, "hf")
    tree = lineage(folder)
    assert [(node["path"], node["changed"], node["inputs"]) for node in tree["inputs"]] == [(str(folder), True, [])]


@pytest.mark.parametrize("eos", [None, 2])
def test_what_generation_is_told_is_kept(tokenizer: Tokenizer, tmp_path: Path, eos: int | None) -> None:
    told = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    hf.save(Llama(LlamaConfig(len(tokenizer), 32, 32, 1, 1, eos_token_id=eos)), tmp_path / "m", generation=told)
    tokenizer.save(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "copy", "hf")
    kept = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert kept == told | {"bos_token_id": 1} | ({} if eos is None else {"eos_token_id": [2]})


def test_progress_ends_at_its_end(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=True, rope_theta=500000.0,
    )  # fmt: skip
    hf.save(Llama(config), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    told: list[float] = []
    totals: list[float] = []

    @contextmanager
    def progress(label: str, total: float, quiet: bool) -> Iterator[Callable[..., None]]:
        totals.append(total)
        yield lambda done, note="": told.append(done)

    monkeypatch.setattr("camelid.formats.convert.progress", progress)
    for to, shards in (("hf", 1), ("gguf", 1), ("meta", 1), ("meta", 2)):
        convert(tmp_path / "model", tmp_path / f"{to}{shards}.gguf", to, shards)
        assert told[-1] == totals[-1]
