"""A GGUF model in several files, as the gguf package splits it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from camelid.artifact import described, identity
from camelid.errors import FormatError
from camelid.formats import load
from camelid.formats.convert import size_of
from camelid.formats.gguf_file import parse_whole
from camelid.formats.load import open_model
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama

from .test_gguf import write_model


@pytest.fixture
def wide() -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5))  # fmt: skip


def test_a_model_in_several_files_is_opened_by_any_of_them(tmp_path: Path, wide: Llama) -> None:
    """As the gguf package splits it."""
    (tmp_path / "whole").mkdir()
    write_model(tmp_path / "whole/m.gguf", wide, "Q8_0")
    write_model(tmp_path / "m.gguf", wide, "Q8_0", tensors_a_file=8)
    files = sorted(tmp_path.glob("*.gguf"))
    assert [f.name for f in files] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    expected = load(tmp_path / "whole/m.gguf").state_dict()
    for file in files:
        found = load(file).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert size_of(file) == sum(f.stat().st_size for f in files)
        assert identity(file) == identity(files[0])
        assert described(file)["bytes"] == size_of(file)
    before = identity(files[0])
    files[2].write_bytes(files[2].read_bytes()[:-1] + b"!")
    assert identity(files[0]) != before


def test_files_that_are_not_all_of_one_model(tmp_path: Path, wide: Llama) -> None:
    write_model(tmp_path / "m.gguf", wide, "F32", tensors_a_file=8)
    first, second, third = sorted(tmp_path.glob("*.gguf"))
    kept = third.read_bytes()
    third.unlink()
    with pytest.raises(FormatError, match=r"one of 3 files of a model, of which 2 are here by names like NAME"):
        open_model(first)
    shutil.copy(second, third)
    with pytest.raises(FormatError, match=r"m-00003-of-00003\.gguf: it does not say that it is file 3 of 3"):
        open_model(first)
    third.write_bytes(second.read_bytes().replace(b"split.no\x02\0\0\0\x01", b"split.no\x02\0\0\0\x02"))
    with pytest.raises(FormatError, match="is in another file of this model too"):
        open_model(second)
    third.write_bytes(kept)
    told = b"split.tensors.count\x05\0\0\0"
    first.write_bytes(first.read_bytes().replace(told + b"\x15", told + b"\x16"))
    with pytest.raises(FormatError, match="hold 21 tensors, not 22: one is of another model"):
        open_model(first)
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(FormatError, match="one of 3 files of a model, of which 1 are here"):
        open_model(tmp_path / "renamed.gguf")


@pytest.mark.parametrize("count", [0, 1])
def test_a_file_that_was_joined_is_whole(tmp_path: Path, wide: Llama, count: int) -> None:
    write_model(tmp_path / "m.gguf", wide, "F32", split_count=count)
    assert parse_whole(tmp_path / "m.gguf").metadata["split.count"] == count
