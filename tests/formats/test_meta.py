"""Meta's folders: bitwise there and back, the arithmetic of its own model, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from camelid.cli import run as cli
from camelid.errors import CamelidError, FormatError, InputError
from camelid.formats import load, save
from camelid.formats.convert import convert
from camelid.formats.load import load_tokenizer, open_model, stop_ids
from camelid.formats.meta import feed_forward_of, params_of, write
from camelid.model.config import LlamaConfig, RopeScaling
from camelid.model.llama import Llama
from camelid.tokenizer.tokenizer import Tokenizer

KINDS: dict[str, dict[str, Any]] = {
    "1": {"rms_norm_eps": 1e-6},
    "2, grouped": {"num_key_value_heads": 8, "max_position_embeddings": 4096},
    "3": {"num_key_value_heads": 8, "rope_theta": 500000.0, "max_position_embeddings": 8192},
    "3.1": {"num_key_value_heads": 8, "rope_theta": 500000.0, "max_position_embeddings": 131072,
            "rope_scaling": RopeScaling("llama3", factor=8.0, original_max_position_embeddings=8192)},
}  # fmt: skip


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> Llama:
    torch.manual_seed(0)
    shape = {"vocab_size": 400, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
             "num_attention_heads": 16, "rms_norm_eps": 1e-5}  # fmt: skip
    return Llama(LlamaConfig(**(shape | KINDS[kind]))).to(dtype).eval()


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_every_bit(tokenizer: Tokenizer, tmp_path: Path, kind: str, shards: int) -> None:
    dtype = torch.bfloat16 if shards == 2 else torch.float16 if shards == 8 else torch.float32
    model = model_of(kind, dtype)
    save(model, tmp_path / "hf")
    tokenizer.save(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", "meta", shards)
    assert len(list((tmp_path / "meta").glob("consolidated.*.pth"))) == shards
    opened = open_model(tmp_path / "meta").config
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "kv_heads", "vocab_size",
            "rope_theta", "rope_scaling", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")  # fmt: skip
    assert {k: getattr(opened, k) for k in same} == {k: getattr(model.config, k) for k in same}
    convert(tmp_path / "meta", tmp_path / "back", "hf")
    back: Llama = load(tmp_path / "back")
    assert back.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
    assert load_tokenizer(tmp_path / "meta").digest() == tokenizer.digest()


def theirs(params: dict[str, Any], weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Meta's model (llama/model.py, llama3/model.py), written down from its formulas: complex rotations of interleaved
    pairs. Logits [seq, vocab] of ids [seq], float64."""
    dim, heads, kv = params["dim"], params["n_heads"], params.get("n_kv_heads", params["n_heads"])
    size = dim // heads
    frequencies = 1.0 / params.get("rope_theta", 10000.0) ** (torch.arange(0, size, 2).float() / size)
    if params.get("use_scaled_rope"):
        scaled = []
        for f in frequencies.tolist():
            wavelength = 2 * math.pi / f
            smooth = (8192 / wavelength - 1) / 3
            blend = (1 - smooth) * f / 8 + smooth * f
            scaled.append(f if wavelength < 8192 / 4 else f / 8 if wavelength > 8192 else blend)
        frequencies = torch.tensor(scaled)
    angles = torch.outer(torch.arange(len(ids)).float(), frequencies)
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[:, None]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weight

    def rotated(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(-2)

    w = {name: tensor.double() for name, tensor in weights.items()}
    x = w["tok_embeddings.weight"][ids]
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    for n in range(params["n_layers"]):
        at = f"layers.{n}."
        h = norm(x, w[at + "attention_norm.weight"])
        q = rotated((h @ w[at + "attention.wq.weight"].T).view(-1, heads, size))
        k = rotated((h @ w[at + "attention.wk.weight"].T).view(-1, kv, size)).repeat_interleave(heads // kv, 1)
        v = (h @ w[at + "attention.wv.weight"].T).view(-1, kv, size).repeat_interleave(heads // kv, 1)
        scores = (torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size) + mask).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", scores, v).flatten(1) @ w[at + "attention.wo.weight"].T
        h = norm(x, w[at + "ffn_norm.weight"])
        gate = torch.nn.functional.silu(h @ w[at + "feed_forward.w1.weight"].T)
        x = x + (gate * (h @ w[at + "feed_forward.w3.weight"].T)) @ w[at + "feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_what_metas_model_computes_with(folder: Path, kind: str) -> None:
    model = model_of(kind)
    save(model, folder / "hf")
    load_tokenizer(folder).save(folder / "hf")
    convert(folder / "hf", folder / "meta", "meta")
    params = json.loads((folder / "meta" / "params.json").read_text())
    weights = torch.load(folder / "meta" / "consolidated.00.pth", weights_only=True)
    ids = torch.randint(0, 400, (40,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        found = model.double()(ids[None]).logits[0]
    torch.testing.assert_close(found, theirs(params, weights, ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "rule"),
    [("7b", (256, None)), ("13b", (256, None)), ("65b", (256, None)), ("llama-2-70b", (4096, 1.3)),
     ("llama-3-8b", (1024, 1.3)), ("llama-3-70b", (4096, 1.3)), ("llama-3.2-1b", (256, 1.5))],
)  # fmt: skip
def test_published_shapes_have_their_rule(size: str, rule: tuple[int, float | None]) -> None:
    config = LlamaConfig.named(size)
    found = feed_forward_of(config.hidden_size, config.intermediate_size)
    plain = int(2 * 4 * config.hidden_size / 3)
    wide = int(found.get("ffn_dim_multiplier", 1) * plain)
    assert -(-wide // found["multiple_of"]) * found["multiple_of"] == config.intermediate_size
    multiple, factor = rule
    assert -(-int((factor or 1) * plain) // multiple) * multiple == config.intermediate_size


def test_shapes_by_params(folder: Path) -> None:
    """What published params.json leave unsaid: the vocabulary (-1), the context, and a feed-forward of any size."""
    assert feed_forward_of(100, 301)["multiple_of"] == 1
    save(model_of("1"), folder / "hf")
    load_tokenizer(folder).save(folder / "hf")
    convert(folder / "hf", folder / "meta", "meta")
    path = folder / "meta" / "params.json"
    kept = json.loads(path.read_text())
    assert stop_ids(folder / "meta") == stop_ids(folder / "hf")
    (folder / "meta" / "generation_config.json").unlink()  # a download has none
    for change, context in (({"norm_eps": 1e-6}, 2048), ({"norm_eps": 1e-5}, 4096), ({"rope_theta": 1e6}, 16384)):
        path.write_text(json.dumps(kept | {"vocab_size": -1} | change))
        config = open_model(folder / "meta").config
        assert (config.vocab_size, config.max_position_embeddings, config.kv_heads) == (400, context, 16)
    assert stop_ids(folder / "meta") == (2,)


# The fields of ModelArgs in llama (v1, main) and llama3: what else stands in params.json is a TypeError there, and so
# is max_seq_len, which the loaders give themselves.
FIELDS = {"dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps"}
LATER = {"n_kv_heads", "ffn_dim_multiplier"}


@pytest.mark.parametrize(
    ("size", "fields"),
    [("7b", FIELDS), ("llama-2-7b", FIELDS | LATER), ("llama-2-70b", FIELDS | LATER),
     ("llama-3-8b", FIELDS | LATER | {"rope_theta"}),
     ("llama-3.1-8b", FIELDS | LATER | {"rope_theta", "use_scaled_rope"})],
)  # fmt: skip
def test_metas_loaders_take_every_word(size: str, fields: set[str]) -> None:
    assert params_of(LlamaConfig.named(size)).keys() <= fields


def test_a_tokenizer_that_grew_beside_its_model_file(data: Path, tmp_path: Path) -> None:
    """The tokens that a tokenizer.model lacks, and the chat template, go along."""
    tokenizer = load_tokenizer(data / "tokenizers" / "llama2")
    tokenizer.backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = "{{ messages[0].content }}"
    save(Llama(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                           num_attention_heads=2)), tmp_path / "hf")  # fmt: skip
    shutil.copyfile(data / "tokenizers" / "llama2" / "tokenizer.model", tmp_path / "hf" / "tokenizer.model")
    tokenizer.save(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", "meta")
    again = load_tokenizer(tmp_path / "meta")
    assert again.encode("<|im_start|>hello") == tokenizer.encode("<|im_start|>hello")
    assert again.chat_template == tokenizer.chat_template
    assert (tmp_path / "meta" / "tokenizer.model").exists()


def test_what_meta_cannot_say(tmp_path: Path) -> None:
    for change, why in (
        ({"attention_bias": True}, "no biases"), ({"head_dim": 32}, "dim / n_heads"),
        ({"rope_scaling": RopeScaling("linear", factor=2.0)}, "cannot say this RoPE scaling, 'linear'"),
        ({"rope_scaling": RopeScaling("llama3", factor=8.0, original_max_position_embeddings=256)}, "'llama3' by 8"),
    ):  # fmt: skip
        config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                             num_attention_heads=4, **change)  # fmt: skip
        with pytest.raises(InputError, match=why):
            params_of(config)


def test_an_output_projection_of_its_own_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the shape of Llama 3.2 1B, whose published files hold the embedding twice."""
    monkeypatch.setattr("camelid.formats.meta.LLAMA3_ROWS", 63)  # of a vocabulary that is quickly written
    for tied in (False, True):
        shape = LlamaConfig(
            vocab_size=64, hidden_size=2048, intermediate_size=8, num_hidden_layers=16, num_attention_heads=2,
            num_key_value_heads=1, head_dim=1024, rope_theta=500000.0, tie_word_embeddings=tied,
        )  # fmt: skip
        with torch.device("meta"):
            names = dict(Llama(shape).named_parameters())
        weights = {name: torch.zeros(t.shape, dtype=torch.bfloat16) for name, t in names.items()}
        weights["embed_tokens.weight"][0, 0] = 1
        (tmp_path / str(tied)).mkdir()
        write(shape, weights, tmp_path / str(tied), None)
        assert open_model(tmp_path / str(tied)).config.tie_word_embeddings == tied


def test_a_neighbours_tokenizer_is_not_taken(tokenizer: Tokenizer, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(tokenizers["sentencepiece"] / "tokenizer.model", tmp_path)
    save(model_of("1"), tmp_path / "hf")
    tokenizer.save(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out" / "meta", "meta")
    assert load_tokenizer(tmp_path / "out" / "meta").digest() == tokenizer.digest()


def test_folders_at_fault(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(model_of("3"), folder / "hf")
    load_tokenizer(folder).save(folder / "hf")
    assert cli(["convert", str(folder / "hf"), "--to", "meta", "--shards", "3", "--out", str(folder / "x")]) == 2
    assert "--shards 3 does not divide" in capsys.readouterr().err
    assert not (folder / "x").exists()
    convert(folder / "hf", folder / "meta", "meta", 2)
    kept = {p: p.read_bytes() for p in (folder / "meta").iterdir()}
    first, second, params = (folder / "meta" / n for n in ("consolidated.00.pth", "consolidated.01.pth", "params.json"))

    def refused(why: str) -> None:
        with pytest.raises(CamelidError, match=why):
            load(folder / "meta")
        for path, data in kept.items():
            path.write_bytes(data)

    params.write_text("{")
    refused("params.json is not JSON")
    params.write_text('{"dim": "128", "n_layers": 2, "n_heads": 16}')
    refused("dim is '128'")
    first.unlink()
    refused("one is missing")
    second.write_bytes(kept[second][:-4000])
    refused("consolidated.01.pth")
    held = torch.load(second, weights_only=True)
    del held["layers.1.attention.wo.weight"]
    torch.save(held, second)
    refused(r"consolidated.01.pth: tensor 'layers.1.attention.wo.weight' is missing")
    torch.save(torch.load(first, weights_only=True) | {"layers.0.attention.bias": torch.zeros(3)}, first)
    refused("'layers.0.attention.bias' is none of a LLaMA's")
    torch.save(torch.load(first, weights_only=True) | {"layers.0.attention.wo.weight": torch.zeros(3, 5)}, first)
    refused("do not fit together")
    rotations = {"rope.freqs": torch.zeros(8), "layers.1.attention.inner_attention.rope.freqs": torch.zeros(8)}
    torch.save(torch.load(first, weights_only=True) | rotations, first)  # of Llama 2, and of LLaMA 1
    load(folder / "meta")
    for path in (first, second):
        path.unlink()
    with pytest.raises(FormatError, match="no consolidated"):
        load(folder / "meta")
