"""Pages, preemption, reuse, guesses and cancellation: what is shared never shows, and what is taken is given back."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from camelid.errors import CamelidError, InputError
from camelid.generate.engine import Engine, result_of
from camelid.generate.lookup import propose
from camelid.generate.native import NativeRunner
from camelid.generate.pages import Pages, page_names
from camelid.generate.runner import Chunk, Runner, TorchRunner
from camelid.generate.sampling import SamplingParams
from camelid.generate.scheduler import run_to_end
from camelid.kernels.decoder import PAGE
from camelid.kernels.library import library
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama

from .conftest import telling

CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
)  # fmt: skip
native = pytest.mark.skipif(library() is None, reason="the native library is not built")


class Counted:
    """A runner that counts the tokens it is fed; `wreck` names positions whose logits it makes no numbers."""

    def __init__(self, runner: Runner, wreck: Sequence[int] = ()) -> None:
        self.runner, self.fed, self.steps, self.wreck = runner, 0, 0, set(wreck)
        self.config = runner.config
        self.at_once, self.adapters, self.active, self.stamp = 96, runner.adapters, runner.active, runner.stamp

    def page_bytes(self) -> int:
        return self.runner.page_bytes()

    def reserve(self, pages: int) -> None:
        self.runner.reserve(pages)

    def run(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        self.fed += sum(len(c.ids) for c in chunks)
        self.steps += 1
        found = self.runner.run(chunks)
        self.wrecked = [c.ids[-1] in self.wreck for c in chunks for _ in range(c.wanted)]
        return [
            torch.full_like(x, torch.nan) if c.ids[-1] in self.wreck else x for x, c in zip(found, chunks, strict=True)
        ]

    def likeliest(self) -> Sequence[int]:
        known = self.runner.likeliest()
        return [-1 if wrecked else token for token, wrecked in zip(known, self.wrecked, strict=True)] if known else ()


class Noise:
    """A runner without a model: any logits, quickly."""

    config = CONFIG
    at_once = 64
    adapters: Sequence[str] = ()
    active: str | None = None

    def stamp(self) -> str:
        return ""

    def page_bytes(self) -> int:
        return 1

    def reserve(self, pages: int) -> None:
        self.pages = pages

    def run(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        for chunk in chunks:
            assert len(chunk.pages) * PAGE >= chunk.position + len(chunk.ids)
            assert max(chunk.pages) < self.pages
        written = [p for c in chunks for p in set(c.pages[c.position // PAGE :])]
        assert len(written) == len(set(written)), "two texts write into one page"
        return [torch.rand(c.wanted, 300) for c in chunks]

    def likeliest(self) -> Sequence[int]:
        return ()


@pytest.fixture(params=["torch", *(pytest.param(kind, marks=native) for kind in ("native", "native int8"))])
def runner(request: pytest.FixtureRequest) -> Runner:
    model = telling(CONFIG)
    if request.param == "torch":
        return TorchRunner(model.double())
    return NativeRunner(model, cache=torch.int8 if request.param.endswith("int8") else None)


def engine(runner: Runner, cache_tokens: int = 4096) -> Engine:
    return Engine(runner, None, stop_ids=(), cache_tokens=cache_tokens)


def prompts(count: int, longest: int = 100, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(300) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def test_texts_that_are_sent_back_are_the_same_texts_with_keys_in_bytes() -> None:
    torch.manual_seed(0)
    test_texts_that_are_sent_back_are_the_same_texts(TorchRunner(Llama(CONFIG).double().eval(), integers=True))


def test_texts_that_are_sent_back_are_the_same_texts(runner: Runner) -> None:
    asked, params = prompts(9), SamplingParams(max_new_tokens=60, temperature=1.0, seed=5)
    expected = [engine(runner).generate([p], params)[0].ids for p in asked]
    tight = engine(runner, 6 * PAGE)
    assert [r.ids for r in tight.generate(asked, params)] == expected
    assert tight.scheduler.preempted > 0
    assert tight.scheduler.pages.taken == 0


def test_a_known_beginning_is_not_computed_again(runner: Runner) -> None:
    beginning = prompts(1, seed=3)[0] * 9
    counted = Counted(runner)
    shared = engine(counted)
    params = SamplingParams(max_new_tokens=8)
    first = shared.generate([[*beginning, 7]], params)[0]
    before = counted.fed
    again = shared.generate([[*beginning, 7], [*beginning, 8, 9]], params)
    whole = len(beginning) // PAGE * PAGE
    assert counted.fed - before <= 2 * (len(beginning) - whole + 3 + 8)
    assert again[0].ids == first.ids
    assert again[1].ids == engine(runner).generate([[*beginning, 8, 9]], params)[0].ids
    assert counted.fed < before + len(beginning)


def test_a_beginning_that_another_text_is_reading_is_waited_for(runner: Runner) -> None:
    beginning = prompts(1, seed=3)[0] * 9
    asked = [[*beginning, n] for n in range(6)]
    counted = Counted(runner)
    found = engine(counted).generate(asked, SamplingParams(max_new_tokens=8))
    assert counted.fed <= len(beginning) + 6 * (PAGE + 8)
    alone = [engine(runner).generate([one], SamplingParams(max_new_tokens=8))[0].ids for one in asked]
    assert [r.ids for r in found] == alone


def test_pairs_of_texts_hold_up_nobody(runner: Runner) -> None:
    """Of each pair one waits; those behind it do not."""
    counted = Counted(runner)
    counted.at_once = 512
    pairs = [[n] * 40 for n in range(8) for _ in range(2)]
    engine(counted).generate(pairs, SamplingParams(max_new_tokens=4))
    assert counted.steps <= 6
    assert counted.fed <= 8 * (40 + 8) + 8 * (4 + 4)


def test_who_waits_for_a_text_that_is_cancelled_reads_it_alone(runner: Runner) -> None:
    busy = engine(runner)
    params = SamplingParams(max_new_tokens=8)
    first, second = (busy.prepare([*range(250), n], params) for n in (1, 2))
    busy.scheduler.runner = Counted(runner)  # 96 tokens a step: the first is read in three
    busy.scheduler.add(first)
    busy.scheduler.add(second)
    busy.scheduler.step()
    assert second in busy.scheduler.waiting
    busy.scheduler.cancel(first)
    run_to_end(busy.scheduler, [second])
    assert second.ids == engine(runner).generate([[*range(250), 2]], params)[0].ids
    assert busy.scheduler.pages.taken == 0


def test_several_texts_of_one_prompt(runner: Runner) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=5)
    [prompt] = prompts(1, seed=4)
    four = engine(runner).several(prompt, params, 4)
    each = [dataclasses.replace(params, seed=5 + n) for n in range(4)]
    assert [r.ids for r in four] == [engine(runner).generate([prompt], one)[0].ids for one in each]
    assert len({tuple(r.ids) for r in four}) == 4
    scored = [
        (sum(one.logprob for one in r.logprobs or []) / 12, r.ids)
        for r in engine(runner).generate([prompt] * 4, [dataclasses.replace(one, logprobs=0) for one in each])
    ]
    best = engine(runner).several(prompt, params, 2, best_of=4)
    wanted = sorted(scored, key=lambda pair: -pair[0])[:2]
    assert [r.ids for r in best] == [ids for _, ids in wanted]
    assert [r.score for r in best] == pytest.approx([score for score, _ in wanted])
    assert best[0].logprobs is None
    for n, most, why in ((3, 2, "n must be"), (1, 5000, "best_of"), (1, "3", "best_of")):
        with pytest.raises(InputError, match=why):
            engine(runner).several(prompt, params, n, best_of=most)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="all are the same"):
        engine(runner).several(prompt, SamplingParams(max_new_tokens=12), 2)


def test_an_adapters_pages_are_its_own() -> None:
    ids = list(range(64))
    assert page_names(ids, "")[0] != page_names(ids, "tuned")[0]
    assert page_names(ids, "")[1] == page_names(ids, "", page_names(ids[:32], ""))[1]
    assert page_names([9, *ids[1:]], "")[1] != page_names(ids, "")[1]  # a name covers all that came before


def test_callers_and_adapters_share_no_pages(runner: Runner) -> None:
    """Each knows only what it was itself given: a hit is faster, and the time of one tells of the other's text."""
    one = engine(runner)

    def entered(salt: str) -> Sequence[int]:
        text = one.prepare(list(range(1, 2 * PAGE + 2)), SamplingParams(max_new_tokens=1000), salt)
        one.scheduler.add(text)
        one.scheduler.step()
        return list(text.pages)

    first, second, again = entered("a"), entered("b"), entered("a")
    assert not set(first) & set(second)
    assert again[:2] == first[:2]
    plain, tuned = (one.prepare([1, 2], SamplingParams(), "a") for _ in range(2))
    tuned.params = dataclasses.replace(tuned.params, adapter="x")
    assert one.scheduler._salt(plain) != one.scheduler._salt(tuned)


def test_pages_are_found_by_content_until_their_room_is_needed() -> None:
    pages = Pages(3)
    a, b = pages.take(), pages.take()
    pages.name(a, b"a")
    pages.name(b, b"b")
    pages.release(a)
    pages.release(b)
    assert pages.free == 3
    assert pages.find([b"a", b"b", b"c"]) == [a, b]
    assert pages.taken == 2
    pages.release(b)
    pages.release(a)
    taken = {pages.take() for _ in range(3)}
    assert len(taken) == 3
    assert pages.find([b"a"]) == []
    with pytest.raises(IndexError):
        pages.take()


@pytest.mark.parametrize("events", [1500, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_random_arrivals_ends_and_cancellations_leave_nothing(events: int) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    busy = Engine(Noise(), None, stop_ids=(), cache_tokens=20 * PAGE)
    known = prompts(10, longest=150)
    live = []
    for _ in range(events):
        what = rng.random()
        if what < 0.3:
            begin = rng.choice(known)
            prompt = [*begin, *(rng.randrange(300) for _ in range(rng.randint(0, 40)))]
            text = busy.prepare(prompt, SamplingParams(max_new_tokens=rng.randint(1, 90), lookup=rng.choice([0, 4])))
            busy.scheduler.add(text)
            live.append(text)
        elif what < 0.4 and live:
            busy.scheduler.cancel(rng.choice(live))
        else:
            busy.scheduler.step()
        live = [text for text in live if text.finish is None]
        readers = sum(busy.scheduler.pages._readers)
        assert readers == sum(len(text.pages) for text in busy.scheduler.running)
    for text in live:
        busy.scheduler.cancel(text)
    assert busy.scheduler.pages.taken == 0
    assert not busy.scheduler.running
    assert not busy.scheduler.waiting
    assert busy.scheduler.preempted > 0


def test_every_text_comes_to_its_end_under_pressure() -> None:
    torch.manual_seed(0)
    busy = Engine(Noise(), None, stop_ids=(), cache_tokens=8 * PAGE)
    results = busy.generate(prompts(40, longest=150), SamplingParams(max_new_tokens=70))
    assert {len(r.ids) for r in results} == {70}
    assert busy.scheduler.preempted > 0


@pytest.mark.parametrize(
    "params", [SamplingParams(max_new_tokens=80), SamplingParams(max_new_tokens=80, temperature=0.05, seed=2)]
)
def test_guesses_do_not_change_the_text(runner: Runner, params: SamplingParams) -> None:
    asked = [[5, 6, 7, 8, 9] * 12, *prompts(3, seed=1)]
    expected = [r.ids for r in engine(runner).generate(asked, params)]
    counted = Counted(runner)
    guessing = engine(counted)
    assert [r.ids for r in guessing.generate(asked, dataclasses.replace(params, lookup=6))] == expected
    assert counted.steps < 80  # some guesses came true
    assert guessing.scheduler.pages.taken == 0


def test_what_followed_before_is_proposed() -> None:
    assert propose([1, 2, 3, 4, 5, 9, 2, 3], 2) == [4, 5]
    assert propose([1, 2, 8, 1, 2, 9, 1, 2], 3) == [9, 1, 2]  # the latest place
    assert propose([7, 1, 2, 8, 6, 1, 2, 9, 7, 1, 2], 1) == [8]  # three tokens before two
    assert propose([1, 2, 3], 4) == []
    assert propose([1, 2, 1, 2], 0) == []


def test_a_text_that_fails_ends_alone(runner: Runner) -> None:
    params = SamplingParams(max_new_tokens=5)
    good = engine(runner).generate([[1, 2]], params)[0]
    wrecked = engine(Counted(runner, wreck=[299]))
    with pytest.raises(CamelidError, match="NaN"):
        wrecked.generate([[4, 299], [1, 2]], params)
    bad, fine = wrecked.generate([[4, 299], [1, 2]], params, strict=False)
    assert (bad.finish_reason, bad.ids) == ("error", [])
    assert "NaN" in (bad.error or "")
    assert (fine.ids, fine.error) == (good.ids, None)


def test_cancelling_frees_pages_at_once(runner: Runner) -> None:
    one = engine(runner)
    text = one.prepare([1, 2, 3], SamplingParams(max_new_tokens=50))
    one.scheduler.add(text)
    one.scheduler.step()
    assert one.scheduler.pages.taken == 1
    one.scheduler.cancel(text)
    one.scheduler.cancel(text)
    assert one.scheduler.pages.taken == 0
    assert result_of(text).finish_reason == "cancelled"


def test_guesses_of_many_texts_share_a_step(runner: Runner) -> None:
    counted = Counted(runner)
    counted.at_once = 20
    busy = engine(counted)
    texts = [busy.prepare([5, 6, 7] * 8, SamplingParams(max_new_tokens=40, lookup=15)) for _ in range(12)]
    for text in texts:
        busy.scheduler.add(text)
    for _ in range(45):
        busy.scheduler.step()
    lengths = [len(text.ids) for text in texts]
    assert min(lengths) > 0
    run_to_end(busy.scheduler, texts)
    assert {len(text.ids) for text in texts} == {40}
    assert len({tuple(text.ids) for text in texts}) == 1


def test_several_threads_may_use_one_engine(runner: Runner) -> None:
    from concurrent.futures import ThreadPoolExecutor

    shared, params = engine(runner), SamplingParams(max_new_tokens=20)
    asked = prompts(8, longest=40)
    expected = [engine(runner).generate([p], params)[0].ids for p in asked]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda p: shared.generate([p], params)[0].ids, asked))
    assert found == expected


def test_what_cannot_fit_is_refused_before_it_waits() -> None:
    small = Engine(Noise(), None, stop_ids=(), cache_tokens=2 * PAGE)
    with pytest.raises(InputError, match="at most 63"):
        small.prepare([1] * 64, SamplingParams())
    [result] = small.generate([[1] * 60], SamplingParams(max_new_tokens=50))
    assert (len(result.ids), result.finish_reason) == (4, "max_length")
    with pytest.raises(InputError, match="cache_tokens must be at least 1"):
        Engine(Noise(), None, cache_tokens=-5)
    with pytest.raises(InputError, match="logit_bias names token 300"):
        small.prepare([1], SamplingParams(logit_bias={300: 1.0}))


@native
@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_alone_is_in_a_random_batch(count: int, bits: int | None) -> None:
    torch.manual_seed(0)
    model = Llama(CONFIG).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3) if weight.dim() > 1 else None
    one = engine(NativeRunner(model, bits))
    asked = prompts(count, longest=50)
    rng = random.Random(1)
    params = [
        SamplingParams(max_new_tokens=rng.randint(1, 12), temperature=rng.choice([0.0, 1.0]), seed=n)
        for n in range(count)
    ]
    alone = [one.generate([p], q)[0].ids for p, q in zip(asked, params, strict=True)]
    order = list(range(count))
    rng.shuffle(order)
    while order:
        part, order = order[: (size := rng.randint(1, 40))], order[size:]
        together = one.generate([asked[n] for n in part], [params[n] for n in part])
        assert [r.ids for r in together] == [alone[n] for n in part]
