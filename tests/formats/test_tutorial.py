"""The tutorial's program, verbatim but for its import, on a checkpoint laid out like decapoda-research/llama-7b-hf."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from camelid import AutoModelForCausalLM, AutoTokenizer
from camelid.errors import InputError
from camelid.formats.hf import hf_name
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama

SHARDS = 33


def tutorial(name: str) -> str:
    """What a reader of the tutorial typed."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)

    input_ids = tokenizer.encode("The meaning of life is", return_tensors="pt")
    output = model.generate(input_ids, max_length=50)
    assert output.shape[1] <= 50
    return tokenizer.decode(output[0], skip_special_tokens=True)


@pytest.fixture(scope="module")
def decapoda(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """33 `.bin` shards, LLaMA spellings, stray inv_freq tensors, tokenizer.model only, pad -1, empty token strings."""
    folder = tmp_path_factory.mktemp("decapoda")
    shutil.copy(tokenizers["sentencepiece"] / "tokenizer.model", folder)
    config = LlamaConfig(vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=31,
                         num_attention_heads=4, max_position_embeddings=128)  # fmt: skip
    torch.manual_seed(0)
    model = Llama(config).half()
    state = {hf_name(name): p.detach() for name, p in model.named_parameters()}
    names = list(state)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"pytorch_model-{shard:05}-of-{SHARDS:05}.bin"
        tensors = {name: state[name].clone() for name in names[shard::SHARDS]}
        if shard < config.num_hidden_layers:
            tensors[f"model.layers.{shard}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        torch.save(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    raw = {
        "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.02, "max_sequence_length": 2048,
        "max_position_embeddings": 128, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 31,
        "pad_token_id": -1, "rms_norm_eps": 1e-06, "torch_dtype": "float16", "vocab_size": 400,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"})
    )
    return folder


def test_the_program_runs(decapoda: Path) -> None:
    text = tutorial(str(decapoda))
    assert text.startswith("The meaning of life is")
    assert len(text) > len("The meaning of life is")


def test_one_bos_from_empty_strings(decapoda: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(decapoda)
    ids = tokenizer.encode("The meaning of life is")
    assert ids[0] == tokenizer.bos_token_id == 1
    assert ids.count(1) == 1
    assert tokenizer.eos_token_id == 2


def test_every_weight_arrived(decapoda: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(decapoda)
    assert model.num_parameters() == model.config.num_parameters()
    assert model.config.pad_token_id is None
    assert (model.config.bos_token_id, model.stop_ids) == (1, (2,))  # the file says 0 and 1, its tokenizer 1 and 2
    torch.manual_seed(0)
    expected = Llama(model.config).half()
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


def test_max_length_counts_the_prompt_and_says_so(decapoda: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(decapoda, torch_dtype="float32")
    ids = torch.tensor([[1, 5, 9]])
    assert model.generate(ids, max_length=10, eos_token_id=None).shape == (1, 10)
    assert model.finish_reasons == ["max_length"]
    assert model.generate(ids, max_new_tokens=10, eos_token_id=None).shape == (1, 13)
    assert model.finish_reasons == ["max_new_tokens"]
    with pytest.raises(InputError, match="no room"):
        model.generate(ids, max_length=3)


def test_padding_changes_nothing(decapoda: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(decapoda, torch_dtype="float64")
    rows = torch.tensor([[0, 0, 1, 7, 8], [1, 20, 21, 22, 23]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    together = model.generate(rows, attention_mask=mask, max_new_tokens=12, eos_token_id=None)
    alone = model.generate(rows[:1, 2:], max_new_tokens=12, eos_token_id=None)
    assert together[0, 5:].tolist() == alone[0, 3:].tolist()


@pytest.mark.parametrize(
    ("ids", "wishes", "says"),
    [
        ([1, 2], {}, "must be whole numbers, .batch, seq."),
        (torch.zeros(0, 4, dtype=torch.int64), {}, "must be whole numbers"),
        (torch.ones(1, 4), {}, "must be whole numbers"),
        ([[1, 2]], {"attention_mask": torch.ones(1, 3)}, r"attention_mask is \[1, 3\], input_ids \[1, 2\]"),
        ([[1, 2]], {"attention_mask": torch.ones(2, 2)}, "attention_mask is"),
        ([[1, 2]], {"eos_token_id": "</s>"}, "eos_token_id is '</s>': an id"),
    ],
)
def test_what_generate_cannot_take(decapoda: Path, ids: Any, wishes: dict[str, Any], says: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(decapoda)
    with pytest.raises(InputError, match=says):
        model.generate(ids, **wishes)
    assert model.generate(torch.tensor([[1, 2]], dtype=torch.int32), max_new_tokens=2).dtype is torch.int64
    wanted = model.generate([[1, 2]], max_new_tokens=6, eos_token_id=[7, 9])
    for ends in (np.array([7, 9]), torch.tensor([7, 9]), [np.int64(7), 9]):
        assert torch.equal(model.generate([[1, 2]], max_new_tokens=6, eos_token_id=ends), wanted)
    assert model.generate([[1, 2]], max_new_tokens=2, eos_token_id=np.int64(7)).shape[0] == 1
    masked = [[0, 1, 1]]
    assert model.generate([[9, 1, 2]], attention_mask=masked, max_new_tokens=2).shape == (1, 5)


def test_a_vocabulary_larger_than_the_embedding_is_refused(decapoda: Path, tmp_path: Path) -> None:
    from camelid import Engine
    from camelid.formats import save

    small = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    save(Llama(small), tmp_path / "m")
    shutil.copy(decapoda / "tokenizer.model", tmp_path / "m")
    with pytest.raises(InputError, match="400 tokens but the embedding only 100 rows"):
        Engine.from_pretrained(tmp_path / "m")
