"""Shapes by name, exact parameter counts, and refusals."""

from __future__ import annotations

import pytest
import torch

from camelid.errors import InputError
from camelid.model.config import SIZES, LlamaConfig
from camelid.model.llama import Llama

# Computed from the published shapes; the papers print 6.7, 13.0, 32.5, 65.2 billion.
COUNTS = {
    "7b": 6_738_415_616, "13b": 13_015_864_320, "30b": 32_528_943_616, "65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
}  # fmt: skip


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts(size: str) -> None:
    with torch.device("meta"):
        model = Llama(LlamaConfig.named(size))
    assert model.num_parameters() == COUNTS[size] == model.config.num_parameters()


@pytest.mark.parametrize("size", SIZES)
def test_round_trip_through_a_hugging_face_config(size: str) -> None:
    config = LlamaConfig.named(size)
    assert LlamaConfig.from_dict(config.to_dict()) == config


def test_old_and_new_spelling_of_rope_agree() -> None:
    shape = LlamaConfig.named("llama-3.2-1b").to_dict()
    old = {k: v for k, v in shape.items() if k != "rope_parameters"}
    new = {k: v for k, v in shape.items() if k not in ("rope_scaling", "rope_theta")}
    assert LlamaConfig.from_dict(old) == LlamaConfig.from_dict(new)
    assert LlamaConfig.from_dict(old).rope_scaling.factor == 32.0


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": 30}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, "rope_theta must be above 1"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "head_dim must be above 2"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(fields: dict[str, object], names: str) -> None:
    good = {
        "vocab_size": 10,
        "hidden_size": 32,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    LlamaConfig.from_dict(good)
    with pytest.raises(InputError, match=names):
        LlamaConfig.from_dict(good | fields)


def test_unknown_size_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"llama-3\.2-1b"):
        LlamaConfig.named("llama3.2-1b")
