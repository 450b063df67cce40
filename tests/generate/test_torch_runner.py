"""The torch path under an engine: a model that is its owner's too, may be rounded, and whose pages are used again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from camelid.errors import InputError
from camelid.generate.beam import BeamParams
from camelid.generate.cache import KVCache
from camelid.generate.engine import Engine
from camelid.generate.runner import Chunk, TorchRunner
from camelid.generate.sampling import SamplingParams
from camelid.kernels import memory
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.lora import LoraConfig, adapt, merge, use_adapter
from camelid.model.quantized import quantize_head, quantize_layers

from .conftest import telling

CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
)  # fmt: skip
LONG = [(7 * n) % 290 for n in range(70)]


@pytest.fixture
def mine() -> Llama:
    return telling(CONFIG)


def learned(model: Llama, name: str, by: float) -> None:
    adapt(model, LoraConfig(r=4), name)
    torch.manual_seed(ord(name[0]))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if f"adapters.{name}" in key:
                weight.normal_().mul_(by)


def said(engine: Engine, prompts: list[list[int]], adapter: str | None = None) -> list[list[int]]:
    params = SamplingParams(max_new_tokens=8, ignore_eos=True, adapter=adapter)
    return [result.ids for result in engine.generate(prompts, params)]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_rounded_model_reads_a_long_prompt_in_pieces(mine: Llama, bits: int) -> None:
    quantize_layers(mine, bits)
    quantize_head(mine)
    prompt = [(11 * n) % 290 for n in range(700)]
    assert TorchRunner(mine).at_once < len(prompt)
    [pieces] = said(Engine(mine), [prompt])
    runner = TorchRunner(mine)
    runner.reserve(32)
    [logits] = runner.run([Chunk(prompt, 0, range(32))])
    assert int(logits[-1].argmax()) == pieces[0]
    [nothing] = runner.run([Chunk(prompt[:3], 0, range(32), wanted=0)])
    assert nothing.shape == (0, CONFIG.vocab_size)


def test_weights_that_changed_are_read_anew(mine: Llama) -> None:
    """Keys and values of the old ones are not taken for theirs: changed in place, loaded over, merged, replaced."""
    engine = Engine(mine)
    seen = [said(engine, [LONG])]
    other = Llama(CONFIG)

    def doubled() -> None:
        with torch.no_grad():
            mine.layers[0].self_attn.k_proj.weight.mul_(-2)

    def merged() -> None:
        learned(mine, "more", 1.0)
        merge(mine, "more")

    def replaced() -> None:
        mine.embed_tokens.weight = torch.nn.Parameter(mine.embed_tokens.weight.flip(0))

    for change in (doubled, lambda: mine.load_state_dict(other.state_dict()), merged, replaced):
        change()
        assert said(engine, [LONG]) == said(Engine(mine), [LONG])
        seen.append(said(engine, [LONG]))
    assert len({str(ids) for ids in seen}) == len(seen)


def test_the_adapter_that_is_active_now_is_the_one(mine: Llama) -> None:
    engine = Engine(mine)
    base = said(engine, [LONG])
    learned(mine, "a", 1.0)
    first = said(engine, [LONG])
    learned(mine, "b", 1.0)
    use_adapter(mine, "b")
    second = said(engine, [LONG])
    assert len({str(ids) for ids in (base, first, second)}) == 3
    assert said(engine, [LONG], adapter="a") == first
    use_adapter(mine, None)
    assert said(engine, [LONG]) == base
    assert said(engine, [LONG], adapter="b") == second
    runner = engine.runner
    assert isinstance(runner, TorchRunner)
    with runner._using("b"):  # another thread's pass
        assert mine.active_adapter == "b"
        assert engine.prepare([1, 2], SamplingParams()).params.adapter is None


def test_a_text_keeps_to_what_it_began_with(mine: Llama) -> None:
    """Without an adapter, too, though its owner switches one on amid it: the pages it leaves are those of none."""
    learned(mine, "x", 1.0)
    use_adapter(mine, None)
    engine = Engine(mine)
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    [alone] = Engine(mine).generate([LONG], params)
    [after] = said(Engine(mine), [LONG + alone.ids])
    text = engine.prepare(LONG, params)
    engine.scheduler.add(text)
    for number in range(60):
        if number == 3:
            use_adapter(mine, "x")
        engine.scheduler.step()
    assert text.ids == alone.ids
    use_adapter(mine, None)
    assert said(engine, [LONG + alone.ids]) == [after]


def test_a_search_and_a_place_have_the_adapter_that_was_active(mine: Llama) -> None:
    learned(mine, "x", 1.0)
    engine = Engine(mine)
    found = {}
    for name in ("x", None):
        use_adapter(mine, name)
        beams = BeamParams(num_beams=2, max_new_tokens=6)
        found[name] = engine.beam_search(LONG, beams)[0].ids, engine.embed([LONG]).tolist()
    assert found["x"][0] != found[None][0]
    assert found["x"][1] != found[None][1]
    assert engine.beam_search(LONG, replace(beams, adapter="x"))[0].ids == found["x"][0]
    assert engine.embed([LONG], "x").tolist() == found["x"][1]


def test_what_a_broken_text_left_spoils_nobody(mine: Llama) -> None:
    learned(mine, "bad", float("nan"))
    use_adapter(mine, None)
    short, longer = [3, 1, 4, 1, 5], list(range(40, 55))
    alone = [said(Engine(mine), [prompt])[0] for prompt in (short, longer)]
    engine = Engine(mine, cache_tokens=128)
    [broken] = engine.generate([list(range(20))], SamplingParams(max_new_tokens=4, adapter="bad"), strict=False)
    assert broken.finish_reason == "error"
    assert said(engine, [short, longer]) == alone


def test_a_cache_grows_no_further_than_it_was_promised() -> None:
    cache = KVCache(CONFIG)
    cache.most = 10
    found = []
    for most in (3, 4, 7, 10):
        cache.select([0], [range(most)])
        found.append(cache.pages)
    assert found == [3, 6, 10, 10]
    runner = Engine(Llama(CONFIG), cache_tokens=320).runner
    assert isinstance(runner, TorchRunner)
    assert runner._cache.most == 10


def test_strings_that_stop_need_a_tokenizer(mine: Llama) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        Engine(mine).generate([[1, 2]], SamplingParams(stop=["x"]))


def test_a_containers_memory_is_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LIMITS", tmp_path)
    whole = memory.installed()
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.installed() == whole
    (tmp_path / "memory.max").write_text(f"{1 << 20}\n")
    assert memory.installed() == 1 << 20
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    for line, place in (("0::/jobs/7/step", "jobs/7/memory.max"),
                        ("9:memory:/jobs/7", "memory/jobs/memory.limit_in_bytes")):  # fmt: skip
        (tmp_path / "groups").write_text(f"3:cpu,cpuacct:/x\n{line}\n")
        assert memory.installed() == whole
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text(f"{1 << 20}\n")
        assert memory.installed() == 1 << 20
        (tmp_path / place).unlink()
    (tmp_path / "memory.max").write_text(f"{1 << 20}\n")
    pages = Engine(Llama(CONFIG)).scheduler.pages.count
    assert pages == (1 << 18) // TorchRunner(Llama(CONFIG)).page_bytes()


def test_a_factor_that_no_context_could_have() -> None:
    with pytest.raises(InputError, match="factor"):
        LlamaConfig.from_dict({**CONFIG.to_dict(), "rope_scaling": {"rope_type": "dynamic", "factor": 1e308}})
