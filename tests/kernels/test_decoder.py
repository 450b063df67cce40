"""The native decoder: its products and whole steps beside torch, on every kind of CPU that this one can be, and the
same bits whatever is computed beside them."""

from __future__ import annotations

import dataclasses
import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from camelid.errors import InputError
from camelid.generate.native import NativeRunner, native_refusal
from camelid.generate.runner import Chunk
from camelid.kernels.decoder import LEVELS, PAGE, Decoder, level
from camelid.kernels.library import library
from camelid.kernels.packed import KINDS, Packed, pack, pack_integers, rounded
from camelid.model.config import LlamaConfig, RopeScaling
from camelid.model.llama import Llama
from camelid.model.quantized import QuantizedEmbedding, quantize_head, quantize_layers, round_to_nearest

needs_library = pytest.mark.skipif(library() is None, reason="the native library is not built")
pytestmark = needs_library
HERE = [name for name in LEVELS if level(name)]  # what this CPU has

SMALL = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 48},
    "heads of 7 registers": {"head_dim": 112},  # 4, 2 and 1 at a time
    "tied": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_scaling": RopeScaling("llama3", factor=8.0, original_max_position_embeddings=32)},
    "yarn rope": {"rope_scaling": RopeScaling("yarn", factor=4.0, original_max_position_embeddings=32)},
}


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Llama:
    torch.manual_seed(0)
    model = Llama(dataclasses.replace(SMALL, **changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(3) if weight.dim() > 1 else weight.add_(0.1 * torch.randn_like(weight))
            if name.endswith("bias"):
                weight.add_(0.5)
    return model.to(dtype)


def tokens(count: int, seed: int = 0) -> list[int]:
    found: list[int] = torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


def runner(model: Llama, **options: Any) -> NativeRunner:
    made = NativeRunner(model, **options)
    made.reserve(32)
    return made


def random_weight(kind: str, rows: int, columns: int, group: int, symmetric: bool | None) -> tuple[Packed, Tensor]:
    """A packed weight, and what it stands for in float64. `symmetric` None: with a least value for each group."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    if kind.startswith("int"):
        weight[:, : columns // 2] += 0.7  # so that zeros are not in the middle
        found = round_to_nearest(weight, int(kind[3:]), group, bool(symmetric))
        if symmetric is None and kind == "int4":
            assert found.zero is not None
            found = dataclasses.replace(found, zero=None, least=(-found.scale.float() * found.zero - 0.01).half())
        packed = pack_integers(found.packed, found.scale, found.zero, found.bits, least=found.least)
        return packed, found.dense(torch.float64)
    weight = weight.to(getattr(torch, kind))
    return pack(weight, kind), weight.double()


@pytest.fixture(scope="module")
def decoders() -> dict[str, Decoder]:
    model = llama()
    return {name: NativeRunner(model, threads=2, level=name)._decoder for name in HERE}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(1, 32, 32), (31, 64, 32), (33, 96, 32), (64, 256, 128), (100, 192, 192)]
)
@pytest.mark.parametrize("symmetric", [True, False, None])
def test_products(
    decoders: dict[str, Decoder], kind: str, rows: int, columns: int, group: int, symmetric: bool | None
) -> None:
    packed, weight = random_weight(kind, rows, columns, group, symmetric)
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 17, 33):
        x = torch.randn(count, columns, generator=torch.Generator().manual_seed(count))
        x[0, :32] = 0  # a block without a scale
        seen = rounded(x) if kind.startswith("int") else x.bfloat16() if kind == "bfloat16" else x
        expected = seen.double() @ weight.T
        size = seen.double().abs() @ weight.abs().T
        for name, decoder in decoders.items():
            found = decoder.product(packed, x)
            assert ((found.double() - expected).abs() <= 2e-6 * size).all(), (name, count)
            assert torch.equal(found[-1:], decoder.product(packed, x[-1:])), (name, count)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_more_tokens_and_columns_than_tiles_take_at_once(decoders: dict[str, Decoder], kind: str) -> None:
    packed, weight = random_weight(kind, 40, 8224, 32, symmetric=True)
    x = torch.randn(131, 8224, generator=torch.Generator().manual_seed(0))
    for name in {"avx512_bf16", "amx", "amx_simulated"} & set(decoders):
        found = decoders[name].product(packed, x)
        if kind == "bfloat16":
            size = x.bfloat16().double().abs() @ weight.abs().T
            assert ((found.double() - x.bfloat16().double() @ weight.T).abs() <= 2e-6 * size).all(), name
        else:
            assert torch.equal(found, decoders["avx512_bf16"].product(packed, x)), name
        for at in (0, 63, 64, 128, 130):
            assert torch.equal(found[at : at + 1], decoders[name].product(packed, x[at : at + 1])), (name, at)


def test_what_is_simulated_is_never_the_best_of_a_cpu() -> None:
    assert level() == [name for name in HERE if name != "amx_simulated"][-1]


def test_levels_agree_on_integers_to_the_last_bit_but_for_fused_sums(decoders: dict[str, Decoder]) -> None:
    packed, _ = random_weight("int8", 64, 128, 32, symmetric=True)
    x = torch.randn(5, 128)
    found = {name: decoder.product(packed, x) for name, decoder in decoders.items()}
    fused = [value for name, value in found.items() if name != "plain"]
    assert all(torch.equal(value, fused[0]) for value in fused)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", HERE)
def test_logits_are_the_torch_models(shape: str, name: str) -> None:
    model, ids = llama(**SHAPES[shape]), tokens(70)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    [found] = runner(model, threads=2, level=name).run([Chunk(ids, 0, [5, 2, 7], 70)])
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("size", [15, 300, 2503])
@pytest.mark.parametrize("name", HERE)
def test_where_a_row_is_greatest_is_told_with_it(name: str, size: int) -> None:
    """By numpy's rule, the first of equal ones: here each score stands there twice."""
    model, ids = llama(vocab_size=size), [i % size for i in tokens(20)]
    with torch.no_grad():
        model.lm_head.weight[-(size // 2) :] = model.lm_head.weight[: size // 2]
    chunks = [Chunk(ids, 0, [0], 20), Chunk(ids[:3], 0, [1], 0), Chunk(ids[::-1], 0, [2], 1)]
    for threads in (1, 2, 5):
        native = runner(model, threads=threads, level=name)
        rows = torch.cat(native.run(chunks))
        assert native.likeliest() == rows.numpy().argmax(-1).tolist()
        assert len(rows) == 21
    for odd in (0, size - 1):
        broken = llama(vocab_size=size)
        with torch.no_grad():
            broken.lm_head.weight[odd, 5] = torch.nan
        native = runner(broken, threads=2, level=name)
        native.run(chunks)
        assert native.likeliest() == [-1] * 21


def test_a_token_that_the_vocabulary_has_not_is_refused() -> None:
    for id in (-1, 300):
        with pytest.raises(IndexError, match=r"0 … 299"):
            runner(llama()).run([Chunk([5, id], 0, [0], 1)])


@pytest.mark.parametrize("name", HERE)
def test_a_long_text_in_pieces_is_the_torch_models(name: str) -> None:
    """Past the 512 positions that rotations are first made for, and past one page of the cache many times."""
    model, ids = llama(max_position_embeddings=2048), tokens(1100)
    native = NativeRunner(model, threads=2, level=name)
    native.reserve(-(-1100 // PAGE))
    pages = list(reversed(range(-(-1100 // PAGE))))
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, -64:]
    cuts = [0, 400, 900, 1036, 1100]
    parts = [native.run([Chunk(ids[a:b], a, pages, b - a)])[0] for a, b in itertools.pairwise(cuts)]
    assert (parts[-1] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, True), (4, False)])
def test_a_quantised_model_is_its_torch_reference(bits: int, symmetric: bool) -> None:
    model, ids = llama(), tokens(40)
    by_name = {}
    if symmetric:
        by_name["given bits"] = runner(model, bits=bits, cache=torch.float32)
        quantize_layers(model, bits)
    else:
        quantize_layers(model, bits)
        for layer in model.layers:
            rough, other = layer.mlp.up_proj, layer.self_attn.o_proj
            rough.__init__(round_to_nearest(rough.dense(), bits, 32, symmetric=False), None, rough.dtype, True)
            least = dataclasses.replace(other.integers(), least=other.scale * -7.9)
            other.__init__(least, None, other.dtype, True)
    quantize_head(model)
    by_name["given layers"] = runner(model, cache=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    for name, native in by_name.items():
        [found] = native.run([Chunk(ids, 0, [0, 1], 40)])
        # A value that lies on the edge of two steps may be rounded either way: rare, and then a step of one of 64
        # inputs.
        assert (found - expected).abs().max() <= 2e-2 * expected.abs().max(), name
        assert (found - expected).abs().median() <= 1e-5, name


@pytest.mark.parametrize(("bits", "least"), [(8, False), (4, False), (4, True)])
def test_an_embedding_in_whole_numbers(bits: int, least: bool) -> None:
    model, ids = llama(), tokens(40)
    rows = round_to_nearest(model.embed_tokens.weight, bits, 32)
    if least:
        rows = dataclasses.replace(rows, least=rows.scale * -7.3)
    model.embed_tokens.weight = torch.nn.Parameter(rows.dense())
    [expected] = runner(model).run([Chunk(ids, 0, [0, 1], 40)])
    model.add_module("embed_tokens", QuantizedEmbedding(rows, torch.float32))
    [found] = runner(model).run([Chunk(ids, 0, [0, 1], 40)])
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()  # a sum may be fused


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not copy processes")
def test_a_copied_process_has_a_cache_of_its_own() -> None:
    """As servers make them that load the model first: what the copy writes is nobody else's."""
    native, ids = runner(llama(), threads=1), tokens(40)
    native.run([Chunk(ids[:32], 0, [0, 1], 0)])
    read, write = os.pipe()
    copy = os.fork()
    if copy == 0:
        try:
            native.run([Chunk(tokens(40, seed=1), 0, [0, 1], 0)])
            os.write(write, b"done")
        finally:
            os._exit(0)
    assert os.read(read, 4) == b"done"
    os.waitpid(copy, 0)
    [found] = native.run([Chunk(ids[32:], 32, [0, 1], 8)])
    [expected] = runner(llama(), threads=1).run([Chunk(ids, 0, [0, 1], 8)])
    assert torch.equal(found, expected)


def test_what_a_cache_can_be() -> None:
    with pytest.raises(InputError, match="can be float32, bfloat16 or int8"):
        NativeRunner(llama(), cache=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_near_float32(dtype: torch.dtype) -> None:
    model, ids = llama(dtype), tokens(40)
    with torch.inference_mode():
        expected = model.float()(torch.tensor([ids])).logits[0]
    [found] = runner(model.to(dtype), cache=torch.float32).run([Chunk(ids, 0, [0, 1], 40)])
    bound = 1e-5 if dtype == torch.float16 else 3e-2  # bfloat16 rounds what goes into products too
    assert (found - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("cache", [None, torch.int8])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", HERE)
def test_the_same_bits_in_any_batch_chunk_and_number_of_threads(
    kind: str, name: str, cache: torch.dtype | None
) -> None:
    model = llama(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    options: dict[str, Any] = {"cache": cache} | ({"bits": int(kind[3:])} if kind.startswith("int") else {})
    ids, other = tokens(70), tokens(33, seed=1)
    [whole] = runner(model, threads=1, level=name, **options).run([Chunk(ids, 0, [5, 2, 7], 70)])
    native = runner(model, threads=2, level=name, **options)
    cuts = [0, 13, 14, 47, 70]
    parts = [native.run([Chunk(ids[a:b], a, [1, 3, 0], b - a)])[0] for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)
    beside = native.run([Chunk(other, 0, [2, 4], 33), Chunk(ids, 0, [6, 8, 9], 70), Chunk(other[:5], 0, [10], 1)])
    assert torch.equal(beside[1], whole)
    assert torch.equal(beside[0][4], beside[2][0])


@pytest.mark.parametrize("head_dim", [48, 112])
@pytest.mark.parametrize("length", [1, 2, 31, 33, 70])
@pytest.mark.parametrize("name", HERE)
def test_a_cache_of_bfloat16_rounds_what_attention_multiplies_and_nothing_else(
    name: str, length: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = llama(head_dim=head_dim, num_key_value_heads=1), tokens(length)

    def narrow(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        q, k, v = (x.bfloat16().float() for x in (q, k, v))
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(
            torch.ones(length, length).triu(1) > 0, -1e30
        )
        shares = (scores - scores.amax(-1, keepdim=True)).exp()
        return shares.bfloat16().float() @ v / shares.sum(-1, keepdim=True)

    with torch.inference_mode():
        whole = model(torch.tensor([ids])).logits[0]
        for layer in model.layers:
            monkeypatch.setattr(layer.self_attn, "attend", narrow)
        expected = model(torch.tensor([ids])).logits[0]
    [found] = runner(model, level=name, cache=torch.bfloat16).run([Chunk(ids, 0, [3, 0, 1], length)])
    # Over many pages a share is rounded under the maximum so far, here under the greatest of all.
    bound = 1e-4 if length <= 32 else 0.6
    assert (found - expected).abs().mean() <= bound * (whole - expected).abs().mean() + 1e-6
    assert (found - expected).abs().max() <= 1e-2 * expected.abs().max()


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", HERE)
def test_nothing_is_read_that_was_not_written(name: str, cache: torch.dtype) -> None:
    ids = tokens(47)  # the last page is filled to an odd line
    clean, stale = (runner(llama(), level=name, cache=cache) for _ in range(2))
    stale._cache.fill_(0xFF)  # of floats no numbers
    chunks = [Chunk(ids, 0, [3, 0], 47)]
    assert torch.equal(stale.run(chunks)[0], clean.run(chunks)[0])
    assert not clean.run(chunks)[0].isnan().any()


def test_layers_of_different_kinds_side_by_side() -> None:
    model, ids = llama(), tokens(40)
    quantize_layers(model, 8)
    for layer in model.layers:  # as a folder that leaves some layers alone
        made = torch.nn.Linear(64, 64, bias=False)
        made.weight = torch.nn.Parameter(layer.self_attn.v_proj.dense())
        layer.self_attn.v_proj = made
    quantize_head(model)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    [found] = runner(model, cache=torch.float32).run([Chunk(ids, 0, [0, 1], 40)])
    assert (found - expected).abs().median() <= 1e-5


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["q_proj", "k_proj", "v_proj"])
def test_what_is_no_number_comes_through_attention(which: str, value: float, name: str, cache: torch.dtype) -> None:
    model = llama(num_key_value_heads=1)
    getattr(model.layers[0].self_attn, which).weight.data[3, 4] = value
    [found] = runner(model, level=name, cache=cache).run([Chunk(tokens(40), 0, [0, 1], 40)])
    assert not found.isfinite().any()


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_what_is_no_number_does_not_get_lost(bits: int | None) -> None:
    model = llama()
    model.norm.weight.data[3] = torch.nan
    [found] = runner(model, bits=bits).run([Chunk(tokens(5), 0, [0], 1)])
    assert found.isnan().all()


def test_another_default_dtype_changes_nothing() -> None:
    model, ids = llama(), tokens(20)
    native = runner(model, bits=8)
    [expected] = native.run([Chunk(ids, 0, [0], 20)])
    torch.set_default_dtype(torch.float64)
    try:
        fresh = NativeRunner(model, bits=8)
        fresh.reserve(2)
        [found] = fresh.run([Chunk(ids, 0, [0], 20)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_what_is_wanted_is_what_is_returned() -> None:
    native, ids = runner(llama()), tokens(20)
    [every] = native.run([Chunk(ids, 0, [0], 20)])
    none, three = native.run([Chunk(ids, 0, [1], 0), Chunk(ids, 0, [2], 3)])
    assert none.shape == (0, 300)
    assert torch.equal(three, every[-3:])


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"hidden_size": 48, "head_dim": 16}, "multiple of 32"), ({"head_dim": 8}, "head_dim"),
     ({"rope_scaling": RopeScaling("dynamic", factor=2.0)}, "dynamic")],
)  # fmt: skip
def test_what_the_decoder_does_not_take(changes: dict[str, Any], why: str) -> None:
    assert native_refusal(llama()) is None
    assert why in (native_refusal(llama(**changes)) or "")
    assert "float64" in (native_refusal(llama().double()) or "")
    odd = llama()
    quantize_layers(odd, 8, 16)
    assert "groups" in (native_refusal(odd) or "")
