"""A draft's guesses: the text is the one without them, and a draft that is the model itself is never wrong, whatever is
shared, sent back or looked up meanwhile. Its keys and values are right then, at every place."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from camelid.auto import CausalLM
from camelid.cli import run
from camelid.errors import InputError
from camelid.formats.load import load
from camelid.generate import draft as drafts
from camelid.generate.beam import BeamParams
from camelid.generate.constrain import Form
from camelid.generate.engine import Engine, result_of
from camelid.generate.native import NativeRunner
from camelid.generate.runner import Chunk, Runner, TorchRunner
from camelid.generate.sampling import SamplingParams
from camelid.generate.scheduler import run_to_end
from camelid.kernels.decoder import PAGE
from camelid.kernels.library import library
from camelid.model.config import LlamaConfig, RopeScaling
from camelid.model.llama import Llama
from camelid.model.lora import LoraConfig, adapt, use_adapter
from camelid.tokenizer.tokenizer import Tokenizer

CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
)  # fmt: skip
native = pytest.mark.skipif(library() is None, reason="the native library is not built")
KINDS = ["torch", pytest.param("native", marks=native)]


def model(seed: int = 0, config: LlamaConfig = CONFIG) -> Llama:
    torch.manual_seed(seed)
    return Llama(config).eval()


def runner_of(kind: str, weights: Llama) -> Runner:
    return TorchRunner(weights) if kind == "torch" else NativeRunner(weights, threads=2)


def prompts(count: int, seed: int = 0, longest: int = 100) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(300) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@pytest.fixture(autouse=True)
def _always_guessing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "LEAST", 0.0)  # a model at random is never sure


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=50),
        SamplingParams(max_new_tokens=50, temperature=0.02, seed=2),
        SamplingParams(max_new_tokens=50, repetition_penalty=1.3, lookup=3),
    ],
)
def test_the_text_is_the_one_without_a_draft(kind: str, params: SamplingParams) -> None:
    whole, similar = model(), copy.deepcopy(model())
    with torch.no_grad():
        for weight in similar.parameters():
            weight += 0.002 * torch.randn_like(weight)
    asked = prompts(5)
    expected = [r.ids for r in Engine(runner_of(kind, whole), None, ()).generate(asked, params)]
    drafted = Engine(runner_of(kind, whole), None, (), draft=runner_of(kind, similar))
    assert [r.ids for r in drafted.generate(asked, params)] == expected
    assert 0 < drafted.scheduler.came_true < drafted.scheduler.guessed
    assert drafted.scheduler.pages.taken == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_that_is_the_model_itself_is_never_wrong(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that share beginnings, come and go, are cut into chunks and sent back for want of pages."""
    weights = model()
    runner = runner_of(kind, weights)
    monkeypatch.setattr(type(runner), "at_once", 48)
    busy = Engine(runner, None, (), cache_tokens=10 * PAGE, draft=runner_of(kind, weights))
    rng, texts = random.Random(1), []
    beginnings = prompts(3, seed=5, longest=120)
    for number in range(60):
        ids = rng.choice(beginnings)[: rng.randint(1, 80)] + prompts(1, seed=number, longest=20)[0]
        text = busy.prepare(ids, SamplingParams(max_new_tokens=rng.randint(1, 150)))
        texts.append(text)
        busy.scheduler.add(text)
        for _ in range(rng.randint(0, 4)):
            busy.scheduler.step()
        if number % 7 == 0:
            busy.scheduler.cancel(rng.choice(texts))
    run_to_end(busy.scheduler, texts)
    scheduler = busy.scheduler
    assert scheduler.guessed == scheduler.came_true > 500
    assert scheduler.preempted > 0
    assert scheduler.pages.taken == 0
    alone = Engine(runner_of(kind, weights), None, ())
    for text in texts[::10]:
        if text.finish != "cancelled":
            assert alone.generate([text.prompt], text.params)[0].ids == result_of(text).ids


@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_on_from_a_finished_text_finds_the_drafts_pages_whole(kind: str) -> None:
    weights = model()
    engine = Engine(runner_of(kind, weights), None, (), draft=runner_of(kind, weights))
    ids = prompts(1, seed=3)[0]
    for _ in range(6):  # as a conversation does
        ids = ids + engine.generate([ids], SamplingParams(max_new_tokens=37))[0].ids + [7, 8]
    assert engine.scheduler.guessed == engine.scheduler.came_true > 100


def test_lookups_and_guesses_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a lookup proposed, right or wrong, is known to the draft: it is not wrong afterwards."""
    weights = model()
    engine = Engine(weights, None, (), draft=weights)
    assert engine.scheduler.draft
    guess, guesses = engine.scheduler.draft.guess, []

    def watched(texts: list[Chunk], most: list[int]) -> list[list[int]]:
        found = guess(texts, most)
        guesses.extend((text.position + len(text.ids), ids) for text, ids in zip(texts, found, strict=True))
        return found

    monkeypatch.setattr(engine.scheduler.draft, "guess", watched)
    prompt = [5, 6, 7, 8, 9] * 6
    found = engine.generate([prompt], SamplingParams(max_new_tokens=80, lookup=2))[0]
    assert found.ids == Engine(weights, None, ()).generate([prompt], SamplingParams(max_new_tokens=80))[0].ids
    whole = prompt + found.ids
    assert all(whole[at : at + len(ids)] == ids for at, ids in guesses)
    drafted = sum(len(ids) for _, ids in guesses)
    assert drafted > 10
    assert engine.scheduler.guessed - drafted > engine.scheduler.came_true - drafted > 0  # lookups, some of them wrong


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_broken_off_harms_nobody(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = model()
    asked, params = prompts(3, seed=2), SamplingParams(max_new_tokens=30)
    expected = [r.ids for r in Engine(runner_of(kind, weights), None, ()).generate(asked, params)]
    for broken in range(1, 5):
        engine = Engine(runner_of(kind, weights), None, (), draft=runner_of(kind, weights))
        texts = [engine.prepare(ids, params) for ids in asked]
        for text in texts:
            engine.scheduler.add(text)
        for _ in range(broken):
            engine.scheduler.step()
        with monkeypatch.context() as patch:
            patch.setattr(engine.runner, "run", lambda chunks: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.scheduler.step()
        run_to_end(engine.scheduler, texts)
        assert [text.ids for text in texts] == expected
        assert engine.scheduler.guessed == engine.scheduler.came_true


def test_forms_stops_ends_and_adapters(folder: Path, chat_tokenizer: Tokenizer) -> None:
    """Guesses meet all that ends or bends a text."""
    whole = load(folder)
    adapt(whole, LoraConfig(4, 8.0, ("q_proj", "down_proj")), "mine")
    for name, parameter in whole.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    use_adapter(whole, None)
    free = SamplingParams(max_new_tokens=40, ignore_eos=True)
    alone = Engine(copy.deepcopy(whole), chat_tokenizer)
    plain, adapted = alone.generate(["The camel"] * 2, [free, dataclasses.replace(free, adapter="mine")])
    assert plain.ids != adapted.ids
    wishes = [
        free,
        dataclasses.replace(free, adapter="mine"),
        dataclasses.replace(free, stop=(chat_tokenizer.decode(plain.ids[10:12]),)),
        dataclasses.replace(free, form=Form("regex", "[a-z]{3} [0-9]{5,9}"), temperature=1.0, seed=1),
        dataclasses.replace(free, logit_bias={plain.ids[3]: -50.0}, frequency_penalty=0.5, logprobs=2),
    ]
    drafted = Engine(whole, chat_tokenizer, draft=load(folder))
    found, expected = (e.generate(["The camel"] * 5, wishes) for e in (drafted, alone))
    assert [(r.ids, r.text, r.finish_reason) for r in found] == [(r.ids, r.text, r.finish_reason) for r in expected]
    assert [len(r.logprobs or []) for r in found] == [0, 0, 0, 0, 40]
    ending = Engine(load(folder), chat_tokenizer, [plain.ids[7]], draft=load(folder))
    [ended] = ending.generate(["The camel"], SamplingParams(max_new_tokens=40))
    assert (ended.ids, ended.finish_reason) == (plain.ids[:8], "eos")
    assert ending.scheduler.guessed >= ending.scheduler.came_true >= 6
    # What does not guess goes by the model alone.
    searched = [
        [r.ids for r in e.beam_search("The camel", BeamParams(2, 2, max_new_tokens=9))] for e in (drafted, alone)
    ]
    assert searched[0] == searched[1]
    torch.testing.assert_close(drafted.embed(["a", "The camel " * 9]), alone.embed(["a", "The camel " * 9]))


@pytest.mark.parametrize("size", [200, 300, 400])
def test_a_draft_may_have_rows_more_or_less(size: int) -> None:
    """Rows that fill up a vocabulary differ between sizes of one family."""
    whole = model()
    other = model(1, dataclasses.replace(CONFIG, vocab_size=size))
    params = SamplingParams(max_new_tokens=30)
    expected = [r.ids for r in Engine(whole, None, ()).generate(prompts(3), params)]
    assert [r.ids for r in Engine(whole, None, (), draft=other).generate(prompts(3), params)] == expected


def test_beyond_its_context_a_draft_guesses_nothing() -> None:
    whole = model()
    engine = Engine(whole, None, (), draft=model(1, dataclasses.replace(CONFIG, max_position_embeddings=64)))
    engine.generate([list(range(1, 65))], SamplingParams(max_new_tokens=30))
    assert engine.scheduler.guessed == 0


def test_an_unsure_draft_guesses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "LEAST", 0.5)
    engine = Engine(model(), None, (), draft=model())
    engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=30))
    assert engine.scheduler.guessed == 0


def test_the_draft_takes_its_part_of_the_caches_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 1 << 12)
    alone, both = Engine(model(), None, ()), Engine(model(), None, (), draft=model())
    assert both.scheduler.pages.count == alone.scheduler.pages.count // 2


def test_models_that_cannot_guess_are_refused() -> None:
    turning = dataclasses.replace(CONFIG, rope_scaling=RopeScaling("dynamic", 2.0))
    with pytest.raises(InputError, match="cannot be a draft"):
        Engine(model(), None, (), draft=model(0, turning))
    with pytest.raises(InputError, match="cannot guess for"):
        Engine(model(0, turning), None, (), draft=model())


def test_by_transformers_name(monkeypatch: pytest.MonkeyPatch) -> None:
    guess, guessed = drafts.Draft.guess, []
    monkeypatch.setattr(drafts.Draft, "guess", lambda *asked: (guessed.append(1), guess(*asked))[1])
    torch.manual_seed(0)
    whole = CausalLM(CONFIG).eval()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    for wishes in ({"max_new_tokens": 12}, {"max_new_tokens": 12, "do_sample": True, "seed": 3}):
        assert torch.equal(whole.generate(ids, **wishes), whole.generate(ids, **wishes, assistant_model=model(1)))
    assert guessed
    with pytest.raises(InputError, match="assistant_model"):
        whole.generate(ids, num_beams=2, assistant_model=model(1))


def test_from_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", str(folder), "The camel", "--max-new-tokens", "20", "--json"]
    assert run(asked) == 0
    plain = json.loads(capsys.readouterr().out)
    assert run([*asked, "--draft", str(folder), "--draft-quantization", "int8"]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == plain["ids"]
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    told = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = told["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.__getitem__)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(told), encoding="utf-8")
    assert run([*asked, "--draft", str(other)]) == 2
    error = capsys.readouterr().err
    assert str(other) in error
    assert "same vocabulary" in error
    assert run([*asked, "--draft-quantization", "int8"]) == 2
    assert "no draft" in capsys.readouterr().err
    assert run([*asked, "--draft", str(folder), "--num-beams", "2"]) == 2
    assert "--draft" in capsys.readouterr().err
