"""Keys and values as bytes: what is kept is what the rounding says, natively as in torch, and little of the scores is
lost."""

from __future__ import annotations

import gc
from pathlib import Path
from weakref import ref

import pytest
import torch

from camelid.cli import run as command
from camelid.errors import InputError
from camelid.formats.hf import save
from camelid.generate.cache import KVCache
from camelid.generate.engine import Engine
from camelid.generate.native import NativeRunner
from camelid.generate.runner import Chunk, Runner, TorchRunner
from camelid.generate.sampling import SamplingParams
from camelid.kernels.decoder import LEVELS, PAGE, level
from camelid.kernels.library import library
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.tokenizer.tokenizer import Tokenizer

from .conftest import telling

needs_library = pytest.mark.skipif(library() is None, reason="the native library is not built")
CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=48, max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture
def large() -> Llama:
    return telling(CONFIG)


IDS: list[int] = torch.randint(0, 300, (90,), generator=torch.Generator().manual_seed(1)).tolist()
CHUNK = Chunk(IDS, 0, [2, 0, 1], len(IDS))


def test_what_is_kept_is_off_by_half_a_step_at_most(large: Llama) -> None:
    cache = KVCache(CONFIG, integers=True)
    cache.select([0], [[1, 0]])
    layer = cache.layers()[0]
    keys = torch.randn(1, 2, 40, 48) * torch.logspace(-3, 3, 40)[:, None]
    keys[0, 1, 3] = 0
    values = torch.randn(1, 2, 40, 48)
    values[0, 0, 5, 7] = 1000  # an outlier costs its own token's head, and no other
    for given, found in zip((keys, values), layer.append(keys, values), strict=True):
        step = given.abs().amax(-1, keepdim=True) / 127
        assert ((found - given).abs() <= step * 0.50001).all()
        assert not torch.equal(found, given)
    assert layer.keys is not None
    assert layer.keys.data.dtype == torch.int8


def test_pages_are_kept_when_more_are_made() -> None:
    cache = KVCache(CONFIG, integers=True)
    keys, values = torch.randn(2, 1, 2, 40, 48).unbind()
    cache.select([0], [[1, 0]])
    first = cache.layers()[0].append(keys, values)
    cache.select([0, 40], [[9, 8], [1, 0]])
    again = cache.layers()[0].append(*torch.randn(2, 2, 2, 1, 48).unbind())
    for before, after in zip(first, again, strict=True):
        assert torch.equal(after[1, :, :40], before[0])


@needs_library
@pytest.mark.parametrize("name", [name for name in LEVELS if level(name)])
def test_natively_as_in_torch(large: Llama, name: str) -> None:
    native = NativeRunner(large, threads=2, level=name, cache=torch.int8)
    native.reserve(4)
    [found] = native.run([CHUNK])
    [expected] = TorchRunner(large, integers=True).run([CHUNK])
    [exact] = TorchRunner(large).run([CHUNK])
    # A value on the edge of two steps may be rounded either way.
    assert (found - expected).abs().median() <= 1e-5
    assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()
    assert (found - expected).abs().mean() < 0.1 * (found - exact).abs().mean()


def test_little_is_lost(large: Llama) -> None:
    exact, found = (TorchRunner(large, integers).run([CHUNK])[0].log_softmax(-1) for integers in (False, True))
    kl = float((exact.exp() * (exact - found)).sum(-1).mean())
    assert 0 < kl < 1e-4


@pytest.mark.parametrize("kind", ["torch", pytest.param("native", marks=needs_library)])
@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
def test_what_is_no_number_does_not_get_lost(large: Llama, kind: str, projection: str) -> None:
    getattr(large.layers[0].self_attn, projection).weight.data[3] = torch.nan
    runner = TorchRunner(large, integers=True) if kind == "torch" else NativeRunner(large, cache=torch.int8)
    runner.reserve(4)
    [found] = runner.run([CHUNK])
    assert found.isnan().all()


def test_half_the_memory(large: Llama) -> None:
    large.bfloat16()
    runners: list[tuple[Runner, Runner]] = [(TorchRunner(large), TorchRunner(large, integers=True))]
    if library() is not None:
        runners += [(NativeRunner(large), NativeRunner(large, cache=torch.int8))]
    for whole, bytes_ in runners:
        assert whole.page_bytes() == 2 * PAGE * CONFIG.num_hidden_layers * 2 * 48 * 2
        assert bytes_.page_bytes() == 2 * PAGE * CONFIG.num_hidden_layers * 2 * (48 + 4)


def test_from_a_folder(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=128)  # fmt: skip
    save(Llama(config), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    plain = Engine.from_pretrained(tmp_path / "model")
    small = Engine.from_pretrained(tmp_path / "model", kv_cache="int8")
    assert small.runner.page_bytes() < 0.3 * plain.runner.page_bytes()  # of float32
    text = small.generate(["The meaning"], SamplingParams(max_new_tokens=20))[0].text
    asked = ["generate", str(tmp_path / "model"), "The meaning", "--max-new-tokens", "20"]
    assert command([*asked, "--kv-cache", "int8"]) == 0
    assert capsys.readouterr().out == f"{text}\n"
    with pytest.raises(InputError, match="kv_cache is 'int4'"):
        Engine.from_pretrained(tmp_path / "model", kv_cache="int4")  # type: ignore[arg-type]


def test_pages_go_with_their_runner(large: Llama) -> None:
    """At once, not when Python looks for circles: a step of GRPO makes a cache of its own."""
    runner = TorchRunner(large)
    runner.run([Chunk([1, 2, 3], 0, [0])])
    kept = ref(runner._cache)
    gc.disable()
    try:
        del runner
        assert kept() is None
    finally:
        gc.enable()
