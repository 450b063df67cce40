"""GGUF files of ours: read back, read by the gguf package and by transformers, with the same ids for the same text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from camelid.cli import run as cli
from camelid.errors import FormatError, InputError
from camelid.formats import load, save
from camelid.formats.convert import convert
from camelid.formats.gguf import _of_table
from camelid.formats.gguf_blocks import expand
from camelid.formats.gguf_file import parse
from camelid.formats.gguf_pack import PACKERS, block_type, quantize
from camelid.formats.gguf_write import FILE_TYPES, write
from camelid.formats.load import load_tokenizer, open_model
from camelid.kernels.library import library
from camelid.model.config import LlamaConfig, RopeScaling
from camelid.model.llama import Llama
from camelid.model.rope import inverse_frequencies
from camelid.tokenizer.gguf_fields import from_gguf, tokenizer_metadata
from camelid.tokenizer.load import from_folder
from camelid.tokenizer.tokenizer import Tokenizer

from ..conftest import TEXT

gguf = pytest.importorskip("gguf")
TEXTS = [*TEXT[:4], " leading", "trailing ", "", "a\n\n\nb\t c", "1234567 don't 🦙 中文，日本語", "<s> </s> <|eot_id|>"]


def model_of(**changes: Any) -> Llama:
    torch.manual_seed(0)
    shape = {"vocab_size": 448, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}  # fmt: skip
    return Llama(LlamaConfig(**(shape | changes))).eval()


def written(model: Llama, tokenizer: Tokenizer, folder: Path, kind: str) -> Path:
    save(model, folder / "hf")
    tokenizer.save(folder / "hf")
    convert(folder / "hf", folder / "m.gguf", "gguf", kind=kind)
    return folder / "m.gguf"


@pytest.fixture(params=["library", "without"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed by the native library, and without it."""
    if request.param == "without":
        monkeypatch.setattr("camelid.kernels.gguf.library", lambda: None)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0", "Q5_1"])
def test_rounding_is_the_references(kind: str, either: None) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((10_000, 32)).astype(np.float32) * rng.choice([1e-6, 1, 300], (10_000, 1)).astype(
        np.float32
    )
    values[7] = 0
    values[8, :16] = 0
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(quantize(kind, values), theirs.reshape(10_000, -1))


def spread(kind: str, values: Any) -> float:
    """Root of the mean squared error, in units of the values' own."""
    back = expand(kind, quantize(kind, values)).reshape(values.shape)
    return float(np.sqrt(np.square(back - values).mean() / np.square(values).mean()))


def test_larger_blocks_lose_less(either: None) -> None:
    """Figures of ggml's own quantisers on such numbers: 0.0715, 0.0362 and 0.0178 of normal ones; 0.0931, 0.0471 and
    0.0256 of Student's t with three degrees of freedom, which has outliers."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((256, 1024)).astype(np.float32) * np.float32(0.02)
    heavy = (rng.standard_t(3, (256, 1024)) * 0.02).astype(np.float32)
    for kind, bound, heavy_bound in (("Q4_K", 0.0718, 0.096), ("Q5_K", 0.0364, 0.049), ("Q6_K", 0.0179, 0.027)):
        assert spread(kind, normal) < bound, kind
        assert spread(kind, heavy) < heavy_bound, kind
    assert spread("Q4_K", normal) < 0.85 * spread("Q4_0", normal)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_every_number_is_within_a_step(kind: str, either: None) -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((40, 256)).astype(np.float32) * rng.choice([0.05, 1, 300], (40, 1)).astype(np.float32)
    rows[0] = 0
    rows[1] = 0.5  # all alike
    rows[2, :] = 0
    rows[2, 77] = -3  # one alone
    rows[3] = np.abs(rows[3])
    rows[4] = -np.abs(rows[4])
    rows[5, :128] = 0
    back = expand(kind, quantize(kind, rows)).reshape(rows.shape)
    assert np.isfinite(back).all()
    size, levels = (16, 31) if kind == "Q6_K" else (32, 15 if kind == "Q4_K" else 31)
    groups, found = rows.reshape(40, -1, size), back.reshape(40, -1, size)
    width = np.maximum(groups.max(2), 0) - np.minimum(groups.min(2), 0)
    if kind == "Q6_K":
        width = np.abs(groups).max(2)
    coarse = width.max(1, keepdims=True) / 63  # the groups' scales are whole numbers themselves
    assert (np.abs(found - groups).max(2) <= 1.1 * width / levels + 1.1 * coarse + 1e-12).all()
    assert not back[0].any()


@pytest.mark.skipif(library() is None, reason="the native library is not built")
@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_the_library_finds_what_torch_does(kind: str) -> None:
    """But where two candidates are equally good: there the order of a sum decides."""
    rng = np.random.default_rng(2)
    rows = (rng.standard_t(3, (4000, 256)) * np.exp(3 * rng.standard_normal((4000, 1)))).astype(np.float32)
    ours, theirs = quantize(kind, rows), PACKERS[kind](rows)
    assert (ours == theirs).all(1).mean() > 0.95
    lost = [np.square(expand(kind, packed).reshape(rows.shape) - rows).sum(1) for packed in (ours, theirs)]
    assert abs(np.log(lost[0] / lost[1]).mean()) < 1e-3


def test_mixtures_are_llama_cpps() -> None:
    """Of 32 layers these have six bits where the others have four (llama.cpp, use_more_bits)."""
    more = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    for layer in range(32):
        for name in ("attn_v", "ffn_down"):
            wanted = "Q6_K" if layer in more else "Q4_K"
            assert block_type("Q4_K_M", f"blk.{layer}.{name}.weight", 4096, 32, False) == wanted
        assert block_type("Q5_K_M", f"blk.{layer}.attn_q.weight", 4096, 32, False) == "Q5_K"
    assert block_type("Q4_K_M", "output.weight", 4096, 32, False) == "Q6_K"
    assert block_type("Q4_K_M", "token_embd.weight", 4096, 32, False) == "Q4_K"
    assert block_type("Q4_K_M", "token_embd.weight", 4096, 32, True) == "Q6_K"
    assert block_type("Q6_K", "output.weight", 576, 32, False) == "Q8_0"
    assert block_type("Q4_0", "output.weight", 4096, 32, False) == "Q6_K"
    assert block_type("Q4_0", "blk.0.ffn_down.weight", 4096, 32, False) == "Q4_0"
    assert block_type("Q8_0", "output.weight", 4096, 32, False) == "Q8_0"
    assert block_type("F16", "output.weight", 4096, 32, False) == "F16"
    assert block_type("Q8_0", "output.weight", 50, 32, False) == "F16"
    assert set(PACKERS) >= {"Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "Q8_0"}


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_weights_come_back(tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    model = model_of()
    path = written(model, tokenizer, tmp_path, kind)
    back: Llama = load(path, dtype=torch.float32)
    reader = {t.name: t for t in gguf.GGUFReader(path).tensors}
    # Rows of 64 and 96 fill no blocks of 256; what matters most, as the last layer's way down, has six bits or eight.
    instead = {"Q4_K_M": ("Q5_0", "Q8_0"), "Q5_K_M": ("Q5_1", "Q8_0"), "Q6_K": ("Q8_0", "Q8_0")}.get(kind, (kind, kind))
    assert reader["blk.1.attn_q.weight"].tensor_type.name == instead[0]
    assert reader["blk.1.ffn_down.weight"].tensor_type.name == instead[1]
    assert reader["output_norm.weight"].tensor_type.name == "F32"
    for name, tensor in model.named_parameters():
        found = back.state_dict()[name]
        if kind == "F32" or tensor.dim() == 1:
            assert torch.equal(found, tensor), name
        elif kind in ("F16", "BF16"):
            narrow = torch.float16 if kind == "F16" else torch.bfloat16
            assert torch.equal(found, tensor.to(narrow).float()), name
        else:
            steps = {"Q8_0": 127, "Q6_K": 127, "Q4_0": 8}.get(kind, 15.5)
            step = tensor.detach().view(-1, 32).abs().amax(1) / steps
            assert ((found - tensor).abs().view(-1, 32).amax(1) <= step * 1.02 + 1e-6).all(), name
    config = open_model(path).config
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "kv_heads", "head_size", "rms_norm_eps",
            "max_position_embeddings", "rope_theta", "tie_word_embeddings", "vocab_size")  # fmt: skip
    assert {k: getattr(config, k) for k in same} == {k: getattr(model.config, k) for k in same}


@pytest.mark.parametrize("which", ["byte-level", "sentencepiece"])
def test_text_is_cut_the_same(tokenizers: dict[str, Path], tmp_path: Path, which: str) -> None:
    tokenizer = from_folder(tokenizers[which])
    path = written(model_of(), tokenizer, tmp_path, "F16")
    back = load_tokenizer(path)
    for text in TEXTS:
        assert back.encode(text) == tokenizer.encode(text), text
        assert back.encode(text, parse_special=False) == tokenizer.encode(text, parse_special=False), text
        assert back.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert (back.bos_token_id, back.eos_token_id, back.pad_token_id) == (
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id,
    )  # fmt: skip
    assert back.chat_template == tokenizer.chat_template
    assert len(parse(path).metadata["tokenizer.ggml.tokens"]) == 448


def test_transformers_reads_what_we_wrote(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Through its own GGUF reader: logits equal ours, so nothing is permuted wrongly."""
    transformers = pytest.importorskip("transformers")
    model = model_of()
    path = written(model, tokenizer, tmp_path, "F32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    ids = torch.randint(0, 400, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_scaled_rotations(tokenizer: Tokenizer, tmp_path: Path) -> None:
    linear = RopeScaling("linear", factor=4.0)
    llama3 = RopeScaling("llama3", factor=8.0, original_max_position_embeddings=8192)
    for number, scaling in enumerate((linear, llama3)):
        model = model_of(rope_scaling=scaling, rope_theta=500000.0, max_position_embeddings=32768)
        path = written(model, tokenizer, tmp_path / str(number), "F32")
        ids = torch.randint(0, 400, (1, 40))
        positions = torch.arange(40) * 700
        with torch.inference_mode():
            wanted, found = (m.hidden(ids, positions=positions) for m in (model, load(path)))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert load(path).config.rope_scaling == scaling
    for number, scaling in enumerate((
        RopeScaling("dynamic", factor=2.0), RopeScaling("yarn", factor=2.0, beta_fast=8.0),
        RopeScaling("llama3", factor=8.0, original_max_position_embeddings=4096),
    ), 2):  # fmt: skip
        with pytest.raises(InputError, match="no word for this"):
            written(model_of(rope_scaling=scaling), tokenizer, tmp_path / str(number), "F32")


@pytest.mark.parametrize("head", [8, 16, 64])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_table_of_divisors_tells_the_factor(head: int, theta: float, factor: float, tmp_path: Path) -> None:
    scaling = RopeScaling("llama3", factor=factor, original_max_position_embeddings=8192)
    config = LlamaConfig(vocab_size=8, hidden_size=head, num_attention_heads=1, head_dim=head, rope_theta=theta)
    table = inverse_frequencies(config)[0] / inverse_frequencies(replace(config, rope_scaling=scaling))[0]
    found = _of_table(table, config)
    assert abs(found.factor - factor) < 1e-2 or table.max() == 1
    assert replace(found, factor=1.0) == replace(scaling, factor=1.0)
    table[len(table) // 2] = 3.0
    with pytest.raises(FormatError, match="no scaling of Llama"):
        _of_table(table, config)


def test_biases_come_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = model_of(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    found = load(written(model, tokenizer, tmp_path, "F32"))
    assert (found.config.attention_bias, found.config.mlp_bias) == (True, True)
    for name, parameter in model.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name


def test_what_is_no_number_is_not_rounded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = model_of()
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"blk\.0\.ffn_up\.weight holds NaN"):
        written(model, tokenizer, tmp_path, "Q8_0")


@pytest.mark.parametrize("scheme", ["always", "first", "never", "normalizer", "gemma"])
@pytest.mark.parametrize("ends", ["<s> $A", "<s> $A </s>", "$A"])
def test_blanks_and_ends_of_sentencepiece_tokenizers(tokenizers: dict[str, Path], scheme: str, ends: str) -> None:
    """In each form that transformers writes: what is read from the fields cuts a text as it was cut."""
    from tokenizers import normalizers, pre_tokenizers, processors

    tokenizer = from_folder(tokenizers["sentencepiece"])
    backend, blank = tokenizer.backend, normalizers.Replace(" ", "▁")
    if scheme in ("normalizer", "gemma"):
        backend.normalizer = blank if scheme == "gemma" else normalizers.Sequence([normalizers.Prepend("▁"), blank])
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous") if scheme == "gemma" else None
    else:
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    backend.post_processor = processors.TemplateProcessing(single=ends, special_tokens=special)
    again = from_gguf(Path("x.gguf"), tokenizer_metadata(tokenizer, len(tokenizer)))
    led = [] if scheme in ("always", "first") else [" a blank is there"]  # where Metaspace adds none
    for text in ("hello", "two  blanks ", "", "骆驼 a\tb", "The meaning of life", *led):
        assert again.encode(text) == tokenizer.encode(text)
    assert (again.bos_token_id, again.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_what_gguf_cannot_say(
    tokenizer: Tokenizer, tokenizers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Regex, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    from camelid.tokenizer.patterns import QWEN2

    strange = Tokenizer(tokenizer.backend, bos_token_id=None, eos_token_id=0)
    kept = tokenizer.backend.pre_tokenizer
    try:
        for cutter in (
            pre_tokenizers.Whitespace(),
            pre_tokenizers.ByteLevel(add_prefix_space=True),
            pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
            pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        ):
            tokenizer.backend.pre_tokenizer = cutter
            with pytest.raises(InputError, match="no name for how this tokenizer cuts"):
                tokenizer_metadata(strange, 448)
        tokenizer.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend.normalizer = normalizers.Sequence([])
        assert tokenizer_metadata(strange, 448)["tokenizer.ggml.pre"] == "gpt-2"
        split = pre_tokenizers.Split(Regex(QWEN2), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
        tokenizer.backend.normalizer = normalizers.NFC()
        assert tokenizer_metadata(strange, 448)["tokenizer.ggml.pre"] == "qwen2"
        tokenizer.backend.normalizer = normalizers.NFKC()
        with pytest.raises(InputError, match=r"normalizer \(NFKC\)"):
            tokenizer_metadata(strange, 448)
    finally:
        tokenizer.backend.pre_tokenizer, tokenizer.backend.normalizer = kept, None
    pieces = Backend(models.Unigram([("<s>", 0.0), ("a", -1.0)]))
    with pytest.raises(InputError, match="kind Unigram"):
        tokenizer_metadata(Tokenizer(pieces, bos_token_id=0, eos_token_id=None), 2)
    whole = from_folder(tokenizers["sentencepiece"])
    whole.backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    with pytest.raises(InputError, match="treats blanks"):
        tokenizer_metadata(whole, 448)
    save(model_of(), tmp_path / "hf")
    tokenizer.save(tmp_path / "hf")
    words = ["convert", str(tmp_path / "hf"), "--to", "gguf", "--out", str(tmp_path / "x.gguf"), "--type", "q3_z"]
    assert cli(words) == 2
    assert "'Q3_Z'; choose one of F32" in capsys.readouterr().err
    assert not list(tmp_path.glob("*x.gguf*"))
    assert cli([*words[:-1], "q8_0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["after"]["bytes"] == (tmp_path / "x.gguf").stat().st_size
    assert cli([*words[:-1], "q8_0"]) == 2
    assert "exists" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"tokenizer has \d+ tokens but the embedding only 64 rows"):
        write(model_of(vocab_size=64).config, {}, tokenizer, tmp_path / "y.gguf", "F16")
