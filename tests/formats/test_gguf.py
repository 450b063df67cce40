"""GGUF: files of the gguf package, refusals by name, hostile headers, and a real model."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from camelid.errors import FormatError, InputError
from camelid.formats import load
from camelid.formats.gguf import _config, _stops
from camelid.formats.gguf_file import TYPE_NAMES, parse
from camelid.formats.load import load_tokenizer
from camelid.model.config import LlamaConfig, RopeScaling
from camelid.model.llama import Llama
from camelid.model.rope import half_split_to_interleaved
from camelid.tokenizer.gguf_fields import from_gguf
from camelid.tokenizer.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


def write_model(
    path: Path, model: Llama, kind: str, shapes: dict[str, tuple[int, ...]] | None = None, tensors_a_file: int = 0,
    split_count: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `model` with the reference package, some tensors of other `shapes`; returns each tensor as that package
    reads it back."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=tensors_a_file)
    c = model.config
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    if split_count is not None:
        writer.add_uint16("split.count", split_count)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    expected = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if ".q_proj." in name or ".k_proj." in name:
            tensor = half_split_to_interleaved(tensor, c.num_attention_heads if ".q_" in name else c.kv_heads)
        full = name if name.startswith("lm_head") else f"model.{name}"
        target = names.get_name(full, try_suffixes=(".weight",))
        wanted = gguf.GGMLQuantizationType[kind if tensor.dim() == 2 else "F32"]
        if shapes and name in shapes:
            tensor = tensor.new_ones(shapes[name])
        data = gguf.quants.quantize(tensor.numpy(), wanted)
        writer.add_tensor(target, data, raw_dtype=wanted)
        expected[name] = gguf.quants.dequantize(data, wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture
def wide() -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5))  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_equals_the_reference(tmp_path: Path, wide: Llama, kind: str) -> None:
    expected = write_model(tmp_path / "m.gguf", wide, kind)
    ours = load(tmp_path / "m.gguf", dtype=torch.float32)
    assert ours.config.rms_norm_eps == 1e-5
    for name, parameter in ours.named_parameters():
        value = parameter
        if ".q_proj." in name or ".k_proj." in name:
            value = half_split_to_interleaved(parameter, 4 if ".q_" in name else 2)
        assert np.array_equal(value.detach().numpy(), np.asarray(expected[name]).reshape(value.shape)), name


def test_an_unsupported_type_is_refused_by_name(tmp_path: Path, wide: Llama) -> None:
    write_model(tmp_path / "m.gguf", wide, "MXFP4")
    with pytest.raises(FormatError, match=r"has the type MXFP4, which camelid does not read"):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize("options", [{}, {"integers": True}, {"bits": 4}])
@pytest.mark.parametrize("shape", [(4, 64, 64), (1, 64, 64), (64 * 64,)])
def test_a_matrix_of_another_number_of_dimensions_is_refused(
    tmp_path: Path, wide: Llama, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    write_model(tmp_path / "m.gguf", wide, "Q4_0", {"layers.0.self_attn.q_proj.weight": shape})
    with pytest.raises(FormatError, match=r"attn_q|q_proj"):
        load(tmp_path / "m.gguf", **options)


def test_types_go_by_the_references_numbers() -> None:
    """All of them: a file of a type that is not read is refused by its name."""
    assert {int(kind): kind.name for kind in gguf.GGMLQuantizationType} == TYPE_NAMES


def test_values_of_every_kind(tmp_path: Path) -> None:
    """As the reference writes them, the extremes of each; and a list of lists of lists, no deeper."""
    kinds = gguf.GGUFValueType
    values: dict[Any, Any] = {
        kinds.UINT8: 2**8 - 1, kinds.INT8: -(2**7), kinds.UINT16: 2**16 - 1, kinds.INT16: -(2**15),
        kinds.UINT32: 2**32 - 1, kinds.INT32: -(2**31), kinds.UINT64: 2**64 - 1, kinds.INT64: -(2**63),
        kinds.FLOAT32: 0.1, kinds.FLOAT64: 0.1, kinds.BOOL: True, kinds.STRING: "骆驼",
    }  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for kind, value in values.items():
        writer.add_key_value(f"one.{kind.name}", value, kind)
        writer.add_key_value(f"two.{kind.name}", [value, value], kinds.ARRAY, sub_type=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = parse(tmp_path / "m.gguf").metadata
    for kind, value in values.items():
        wanted = float(np.float32(value)) if kind is kinds.FLOAT32 else value
        assert found[f"one.{kind.name}"] == wanted
        assert found[f"two.{kind.name}"] == [wanted, wanted]
    deep = text("k") + struct.pack("<IIQIQIQ", 9, 9, 1, 9, 1, 0, 1) + b"\7"
    (tmp_path / "x.gguf").write_bytes(header(deep, keys=1))
    assert parse(tmp_path / "x.gguf").metadata == {"k": [[[7]]]}
    deeper = text("k") + struct.pack("<IIQIQIQIQ", 9, 9, 1, 9, 1, 9, 1, 0, 1) + b"\7"
    (tmp_path / "x.gguf").write_bytes(header(deeper, keys=1))
    with pytest.raises(FormatError, match="unknown metadata type 9"):
        parse(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"llama.attention.head_count": 0}, "head_count is 0"),
        ({"llama.attention.head_count": 4.0}, "not a whole number"),
        ({"llama.rope.scaling.type": "dynamic"}, "rope.scaling.type is 'dynamic'"),
        ({"llama.rope.freq_base": "10000"}, "rope.freq_base is '10000', not a number"),
        ({"general.architecture": "gptneox"}, "opens 'llama' only"),
    ],
)
def test_settings_at_fault(tmp_path: Path, wide: Llama, changes: dict[str, Any], said: str) -> None:
    write_model(tmp_path / "m.gguf", wide, "F32")
    file = parse(tmp_path / "m.gguf")
    with pytest.raises(FormatError, match=said):
        _config(dataclasses.replace(file, metadata={**file.metadata, **changes}))


def test_settings_that_files_leave_out(tmp_path: Path, wide: Llama) -> None:
    write_model(tmp_path / "m.gguf", wide, "F32")
    file = parse(tmp_path / "m.gguf")
    meta = {key: value for key, value in file.metadata.items() if key != "llama.attention.head_count_kv"}
    found = _config(dataclasses.replace(file, metadata={**meta, "llama.attention.head_count": 1}))
    assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim) == (1, 1, 64)
    assert (found.rope_theta, found.rope_scaling) == (10000.0, RopeScaling())
    for kind in ("linear", "yarn"):
        scaled = {f"llama.rope.scaling.{key}": value for key, value in (("type", kind), ("factor", 2.0))}
        scaled["llama.rope.scaling.original_context_length"] = 1024
        found = _config(dataclasses.replace(file, metadata={**file.metadata, **scaled}))
        assert (found.rope_scaling.rope_type, found.rope_scaling.factor) == (kind, 2.0)
        assert found.rope_scaling.original_max_position_embeddings == 1024


@pytest.mark.parametrize(
    ("said", "scaling"),
    [
        ({"rope.scale_linear": 4.0}, RopeScaling("linear", factor=4.0)),  # files of 2023
        ({"rope.scaling.factor": 4.0}, RopeScaling("linear", factor=4.0)),  # llama.cpp's default type
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, RopeScaling()),
        ({"rope.scaling.type": "linear"}, RopeScaling()),
        ({"rope.scaling.type": "yarn"}, RopeScaling()),
        ({"rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 1.0}, RopeScaling("linear", factor=2.0)),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_beta_fast": 8.0,
             "rope.scaling.yarn_beta_slow": 2.0},
            RopeScaling("yarn", factor=2.0, beta_fast=8.0, beta_slow=2.0),
        ),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 0.5}, None),
        ({"rope.scaling.factor": 2.0, "rope.scaling.yarn_beta_fast": 8.0}, None),
    ],
)  # fmt: skip
def test_scaling_as_llama_cpp_reads_it(
    tmp_path: Path, wide: Llama, said: dict[str, Any], scaling: RopeScaling | None
) -> None:
    write_model(tmp_path / "m.gguf", wide, "F32")
    file = parse(tmp_path / "m.gguf")
    file = dataclasses.replace(file, metadata=file.metadata | {f"llama.{key}": value for key, value in said.items()})
    if scaling is None:
        with pytest.raises(FormatError, match=r"which camelid does not read"):
            _config(file)
    else:
        assert _config(file).rope_scaling == scaling


def header(*parts: bytes, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + b"".join(parts)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


HOSTILE = {
    "empty": b"",
    "not gguf": b"x" * 64,
    "a billion tensors": header(tensors=10**9),
    "a string past the end": header(struct.pack("<Q", 2**62), keys=1),
    "an endless array": header(text("k"), struct.pack("<IIQ", 9, 4, 2**63), keys=1),
    "an endless string array": header(text("k"), struct.pack("<IIQ", 9, 8, 2**63), keys=1),
    "a string a little too long": header(text("k"), struct.pack("<IQ", 8, 30), b"x" * 10, keys=1),
    "an array a little too long": header(text("k"), struct.pack("<IIQ", 9, 4, 5), b"x" * 8, keys=1),
    "a text after the last": header(text("k"), struct.pack("<IIQ", 9, 8, 2), text("a"), keys=1),
    "nested arrays": header(text("k"), struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50, keys=1),
    "five dimensions": header(text("t"), struct.pack("<I", 5), b"\0" * 64, tensors=1),
    "a tensor past the end": header(text("t"), struct.pack("<IQIQ", 1, 2**40, 0, 0), b"\0" * 64, tensors=1),
    "a tensor of nothing": header(text("t"), struct.pack("<IQQIQ", 2, 0, 4, 0, 0), b"\0" * 64, tensors=1),
    "a bad alignment": header(text("general.alignment"), struct.pack("<II", 4, 3), b"\0" * 8, keys=1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.gguf").write_bytes(HOSTILE[name].ljust(24 if name == "empty!" else 0, b"\0"))
    with pytest.raises(FormatError, match=r"x\.gguf"):
        parse(tmp_path / "x.gguf")


def test_a_vocabulary_longer_than_the_embedding(tmp_path: Path, wide: Llama) -> None:
    write_model(tmp_path / "m.gguf", wide, "F32")
    file = parse(tmp_path / "m.gguf")
    rows = wide.config.vocab_size
    words = {"tokenizer.ggml.tokens": [str(n) for n in range(rows + 1)]}
    with pytest.raises(FormatError, match=f"the vocabulary has {rows + 1} tokens, the embedding {rows} rows"):
        _config(dataclasses.replace(file, metadata={**file.metadata, **words}))


WORDS = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "token_type": [1, 1, 1], "merges": ["a b"]}
PIECES = {"model": "llama", "tokens": ["a", "b"], "token_type": [1, 1], "scores": [0.0, -1.0]}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (WORDS | {"tokens": [1, 2, 3]}, "tokens is missing, or not all of it is str"),
        (WORDS | {"tokens": "ab"}, "tokens is missing"),
        (WORDS | {"token_type": [1, 1]}, "token_type has 2 entries, tokenizer.ggml.tokens 3"),
        (WORDS | {"token_type": ["1", "1", "1"]}, "not all of it is int"),
        (WORDS | {"merges": [1]}, "merges is missing, or not all of it is str"),
        (WORDS | {"merges": ["a c"]}, "uses a token that is not in the vocabulary"),
        (WORDS | {"tokens": ["a", "b", "a"]}, "holds a token twice"),
        (WORDS | {"pre": "unheard-of"}, "pre is 'unheard-of'; camelid knows llama-bpe"),
        (WORDS | {"bos_token_id": 3}, "bos_token_id is 3, outside the vocabulary of 3"),
        (WORDS | {"model": "bert"}, "model is 'bert'; camelid reads 'llama' and 'gpt2'"),
        (PIECES | {"scores": [0.0]}, "scores has 1 entries"),
        (PIECES | {"scores": [None, None]}, "not all of it is float"),
    ],
)
def test_vocabularies_at_fault(fields: dict[str, Any], said: str) -> None:
    def read(fields: dict[str, Any]) -> Tokenizer:
        return from_gguf(Path("m.gguf"), {f"tokenizer.ggml.{key}": value for key, value in fields.items()})

    assert len(read(WORDS)) == 3
    assert len(read(PIECES)) == 2
    with pytest.raises(FormatError, match=rf"m\.gguf: .*{said}"):
        read(fields)


def test_truncated(tmp_path: Path, wide: Llama) -> None:
    write_model(tmp_path / "m.gguf", wide, "F32")
    whole = (tmp_path / "m.gguf").read_bytes()
    for size in (len(whole) - 64, len(whole) // 2, 200, 30):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"cut\.gguf"):
            load(tmp_path / "cut.gguf")


def test_smollm2_reproduces_the_golden_figures(smollm2: Path, data: Path) -> None:
    golden = json.loads((data / "models" / "smollm2_q4_1_golden.json").read_text())
    tokenizer = load_tokenizer(smollm2)
    from camelid import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, torch_dtype="float32")
    for case in golden["cases"]:
        assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]
        out = model.generate(torch.tensor([case["prompt_ids"]]), max_new_tokens=40)[0].tolist()
        new = out[len(case["prompt_ids"]) :]
        assert new == case["greedy_ids"]
        assert tokenizer.decode(new, skip_special_tokens=True) == case["text"]
        with torch.inference_mode():
            scores = model(torch.tensor([out])).logits[0].double().log_softmax(-1)
        for at, (logprob, _) in enumerate(case["logprob_and_top2_logit_gap"]):
            assert abs(scores[len(case["prompt_ids"]) - 1 + at, new[at]].item() - logprob) < 2e-4
    for case in golden["ppl"]:
        ids = tokenizer.encode((data / case["file"]).read_text(), add_special_tokens=False)[: case["n_tokens"]]
        assert ids[: len(case["first_ids"])] == case["first_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).item()
        assert abs(loss - case["mean_nll"]) < 1e-4


def test_smollm2_against_transformers_reading_the_same_file(smollm2: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    text = "The capital of France is Paris. 1234 骆驼\n\n  def f(x): return x"
    ids = load_tokenizer(smollm2).encode(text)
    assert ids == their_tokenizer.encode(text)
    ours = load(smollm2, dtype=torch.float32)
    with torch.inference_mode():
        difference = ours(torch.tensor([ids])).logits - theirs(torch.tensor([ids])).logits
    assert difference.abs().max() < 1e-3


def test_every_token_that_ends_something_stops(tmp_path: Path, wide: Llama) -> None:
    """A file may name one end and mean several: those that llama.cpp knows by their text, whatever kind they are."""
    write_model(tmp_path / "m.gguf", wide, "F32")
    file = parse(tmp_path / "m.gguf")
    words = ["a", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>"]
    told = {"tokenizer.ggml.tokens": words, "tokenizer.ggml.token_type": [1, 3, 3, 3, 1],
            "tokenizer.ggml.eos_token_id": 2}  # fmt: skip
    assert _stops(dataclasses.replace(file, metadata=told)) == [2, 1, 3, 4]
    several = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eos_token_ids": [2, 0]}
    assert _stops(dataclasses.replace(file, metadata=several)) == [2, 0]
    assert _stops(dataclasses.replace(file, metadata={})) is None


def test_an_end_of_another_kind_is_a_control_token_too() -> None:
    """Converters of folders with an added_tokens.json call it a word of the user's."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "<|im_end|>"]
    kinds = [2, 3, 3, *[6] * 256, 1, 1, 4]
    told = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": words, "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.scores": [0.0] * len(words), "tokenizer.ggml.bos_token_id": 1}  # fmt: skip
    found = from_gguf(Path("m.gguf"), told)
    assert found.special_tokens[len(words) - 1] == "<|im_end|>"
    assert len(words) - 1 not in found.encode("a<|im_end|>", parse_special=False)


def test_a_file_without_a_name_is_known_by_its_beginning(tmp_path: Path, wide: Llama) -> None:
    """As Ollama keeps them."""
    write_model(tmp_path / "m.gguf", wide, "F32")
    blob = (tmp_path / "m.gguf").rename(tmp_path / "sha256-0123")
    assert load(blob).num_parameters() == wide.num_parameters()
    (tmp_path / "other").write_bytes(b"GG")
    with pytest.raises(InputError, match=r"or a \.gguf file"):
        load(tmp_path / "other")
