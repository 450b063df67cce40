"""What the model computes: whether it reads text at all, in the order that it was trained in, and the same whichever
way it is asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from camelid.generate.engine import Engine
from camelid.generate.native import native_refusal
from camelid.generate.place import runner_for
from camelid.generate.runner import Chunk, TorchRunner
from camelid.generate.sampling import SamplingParams
from camelid.model.config import RopeScaling
from camelid.model.llama import Llama
from camelid.model.rope import half_split_to_interleaved, interleaved_to_half_split
from camelid.verify.checklist import Check, Failed, NotApplicable, Subject

# A model may know one kind only: it is judged by what it reads best.
KINDS = {
    "English": """\
The camel is an even-toed animal that bears distinctive fatty deposits known as humps on its back. Camels have long been
domesticated and, as livestock, they provide food and textiles. Camels are working animals especially suited to their
desert habitat and are a vital means of transport for passengers and cargo.
""",
    "a story": """\
Once upon a time there was a little girl who lived in a small house near the forest. One day she went to the river with
her dog. She saw a big fish and said, "Hello, fish!" The fish looked at her and swam away. She was sad, but then her
mother came and they went home together.
""",
    "Python": """\
def area(width, height):
    return width * height


class Counter:
    def __init__(self, start=0):
        self.value = start

    def add(self, number):
        for _ in range(number):
            self.value += 1
        return self.value
""",
    "Chinese": """\
骆驼是沙漠里的动物。它们可以很多天不喝水。人们用骆驼运送货物。从前有一个小女孩，她住在森林旁边的小房子里。有一天，她和小狗去河边，
看见一条大鱼。鱼看了看她，就游走了。她很难过，后来妈妈来了，她们一起回家。
""",
}
TEXT = "\n".join(KINDS.values())
LONGEST = 512
READS = 0.5  # of chance's nats a token, at most: the model knows this kind of text
MARGIN = 0.1  # nats a token by which another reading must be better to be believed


def _ids(subject: Subject) -> Tensor:
    return torch.tensor([_fitting(subject, TEXT)])


def _fitting(subject: Subject, text: str) -> list[int]:
    config = subject.weights.config
    ids: list[int] = subject.words.encode(text)[: min(LONGEST, config.max_position_embeddings)]
    if max(ids) >= config.vocab_size:
        raise NotApplicable("the tokenizer does not fit the embedding")
    return ids


@torch.inference_mode()
def _losses(subject: Subject) -> dict[str, float]:
    """Mean cross-entropy of the next token in each kind of text, in nats."""
    model, found = subject.weights, {}
    for kind, text in KINDS.items():
        ids = torch.tensor([_fitting(subject, text)])
        found[kind] = float(F.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:]))
    return found


def _best(losses: dict[str, float]) -> tuple[str, float]:
    """The kind of text that is read best."""
    return min(losses.items(), key=lambda one: one[1])


def _chance(subject: Subject) -> float:
    return math.log(subject.weights.config.vocab_size)


def reads(subject: Subject) -> str:
    """Better than chance on some kind of text."""
    losses = _losses(subject)
    if not all(map(math.isfinite, losses.values())):
        raise Failed("the model's scores are not numbers (NaN)")
    (kind, loss), chance = _best(losses), _chance(subject)
    told = f"{loss:.2f} nats a token of {kind}, where chance is {chance:.2f}"
    if loss > chance + 0.5:
        raise Failed(f"{told}: scrambled, or with the tokenizer of another model")
    if loss > chance - 0.5:
        raise NotApplicable(f"{told}: the model is fresh, or knows other texts")
    return told


@contextmanager
def _turned(model: Llama, turn: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
    """The model with the rows of q and k in another order."""
    heads, kv_heads = model.config.num_attention_heads, model.config.kv_heads
    kept = []
    for layer in model.layers:
        for name, count in (("q_proj", heads), ("k_proj", kv_heads)):
            projection = getattr(layer.self_attn, name)
            for weight in (projection.weight, projection.bias):
                if weight is not None:
                    kept.append((weight, weight.data))
                    weight.data = turn(weight.data, count)
    try:
        yield
    finally:
        for weight, data in kept:
            weight.data = data


@contextmanager
def _placed(model: Llama, **changes: Any) -> Iterator[None]:
    """The model with positions told to it in another way."""
    kept = model.config
    model.config = replace(kept, **changes)
    try:
        yield
    finally:
        model.config = kept


def positions(subject: Subject) -> str:
    """No other way to tell positions suits the weights better than the config's, on texts that either reads well."""
    told, most = _losses(subject), _chance(subject) * READS
    found: list[tuple[float, str]] = []
    known = {kind for kind, loss in told.items() if loss < most}
    for name, other in _others(subject):
        better = {kind for kind, loss in other.items() if loss < most}
        if not known and not better:
            continue
        # Where neither way reads, the one that is less sure looks better and is not.
        kind, loss = _best({kind: other[kind] for kind in known or better})
        if loss < told[kind] - MARGIN and loss < _best(told)[1]:
            found.append((loss, f"{told[kind]:.2f} nats a token of {kind} as the config says, {loss:.2f} {name}"))
        known |= better
    if found:
        raise Failed(min(found)[1])
    if not known:
        raise NotApplicable("the model knows none of the texts: nothing suits it better than anything else")
    return "no other order of q and k, base or scaling suits the weights better"


def _others(subject: Subject) -> Iterator[tuple[str, dict[str, float]]]:
    """Other ways to tell positions: what they are, and how texts are read by them."""
    model = subject.weights
    for name, turn in (
        ("with q and k reordered from Meta's pairs to halves: they were not permuted", interleaved_to_half_split),
        ("with q and k reordered from halves to Meta's pairs: they were permuted twice", half_split_to_interleaved),
    ):
        with _turned(model, turn):
            yield name, _losses(subject)
    if model.config.rope_scaling.rope_type != "default":
        with _placed(model, rope_scaling=RopeScaling()):
            yield "without rope_scaling: it does not belong to these weights", _losses(subject)
    for theta in (10_000.0, 100_000.0, 500_000.0, 1_000_000.0):
        if not theta / 2 < model.config.rope_theta < theta * 2:
            with _placed(model, rope_theta=theta):
                yield f"with rope_theta {theta:g}", _losses(subject)


def _near(found: Tensor, wanted: Tensor, what: str, bound: float = 1e-3) -> float:
    """The largest difference, relative to the largest score. Raises Failed beyond the bound."""
    gap = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))
    if not gap <= bound:
        raise Failed(f"{what}: logits differ by {gap:.1e} of the largest")
    return gap


@torch.inference_mode()
def cache(subject: Subject) -> str:
    """Read in pieces, with the keys and values of earlier ones kept, as in one."""
    model, ids = subject.weights, _ids(subject)[0, :100].tolist()
    wanted = model(torch.tensor([ids])).logits[0]
    engine = Engine(model, cache_tokens=256)
    taken, gaps = [engine.scheduler.pages.take() for _ in range(4)], []
    for start, end in ((0, 7), (7, 40), (40, 41), (41, len(ids))):
        end = min(end, len(ids))
        if start < end:
            [found] = engine.runner.run([Chunk(ids[start:end], start, taken, end - start)])
            gaps.append(_near(found, wanted[start:end], f"tokens {start} to {end} read from a cache"))
    return f"logits differ by at most {max(gaps):.0e} of the largest"


@torch.inference_mode()
def packing(subject: Subject) -> str:
    """Two documents in one row: each as if it were alone."""
    model, ids = subject.weights, _ids(subject)
    half = ids.shape[1] // 2
    first, second = ids[:, :half], ids[:, half : 2 * half]
    documents = torch.tensor([[0] * half + [1] * half])
    places = torch.arange(half).repeat(2)[None]
    both = model(torch.cat((first, second), 1), positions=places, document_ids=documents).logits
    other = model(torch.cat((first.flip(1), second), 1), positions=places, document_ids=documents).logits
    if not torch.equal(both[:, half:], other[:, half:]):
        raise Failed("a document's scores change with its neighbour in the row")
    gap = _near(both[:, half:], model(second).logits, "a packed document and the same alone")
    return f"a neighbour changes no bit; alone and packed differ by {gap:.0e} of the largest"


def native(subject: Subject) -> str:
    """The decoder that generates on this machine against the torch model."""
    refusal = native_refusal(subject.weights)
    if refusal is not None:
        raise NotApplicable(f"the torch model generates: {refusal}")
    runner = runner_for(subject.weights)
    if isinstance(runner, TorchRunner):
        raise NotApplicable("the torch model generates")
    ids = _ids(subject)[0, :100].tolist()
    runner.reserve(4)
    [found] = runner.run([Chunk(ids, 0, [0, 1, 2, 3], len(ids))])
    with torch.inference_mode():
        gap = _near(found, subject.weights(torch.tensor([ids])).logits[0], "native and torch")
    return f"logits differ by at most {gap:.0e} of the largest"


def batch(subject: Subject) -> str:
    """A text alone and among others."""
    ids = _ids(subject)[0].tolist()
    prompts = [ids[start : start + 8 + 5 * start % 17] for start in range(0, min(len(ids) - 30, 60), 10)]
    engine = Engine(runner_for(subject.weights) if native_refusal(subject.weights) is None else subject.weights)
    params = SamplingParams(max_new_tokens=16, ignore_eos=True, logprobs=0)
    together = engine.generate(prompts, params)
    for prompt, among in zip(prompts, together, strict=True):
        [alone] = engine.generate([prompt], params)
        for one, other in zip(alone.logprobs or (), among.logprobs or (), strict=True):
            if abs(one.logprob - other.logprob) > 1e-3:
                raise Failed(f"a text's tokens have other scores among others: {one.logprob:.3f}, {other.logprob:.3f}")
            if one.token != other.token:
                break
    return f"{len(prompts)} prompts give the same texts alone and together"


CHECKS = [
    Check("reads", "scrambled or fresh weights, a tokenizer of another model", reads),
    Check("positions", "permuted q and k, a wrong rope_theta or rope_scaling", positions),
    Check("cache", "a cache that shifts or drops positions", cache),
    Check("packing", "packed documents that see each other", packing),
    Check("native", "a fast path that computes something else", native),
    Check("batch", "neighbours that change a text", batch),
]
