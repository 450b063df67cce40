"""Perplexity per token, word and byte, and bits per byte, of a model on held-out text.

Each document is scored by itself, in windows of at most `window` tokens that advance by `stride`, so that every token
is scored once. By default they do not overlap, LLaMA's convention; a smaller stride gives a token at least window -
stride tokens before it, and costs as much more. BOS stands before the document (`document`), before every window
(`window`), or nowhere (`none`), where the first token has nothing to be predicted from and is not scored.

Byte-based figures count the UTF-8 bytes of the text as given and can be compared between tokenizers; token perplexity
cannot.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, get_args

import torch

from camelid.errors import InputError
from camelid.evaluate.opened import check_finite, measured_in
from camelid.evaluate.texts import Text, encoded
from camelid.kernels.cross_entropy import linear_log_probs
from camelid.model.llama import Llama
from camelid.report.progress import progress
from camelid.tokenizer.tokenizer import Tokenizer

BosRule = Literal["document", "window", "none"]
WINDOW = 2048  # LLaMA's


@dataclass(frozen=True)
class Cut:
    """How a document is cut; `full_end` lets its last window begin as early as it may, lm-eval's rolling rule. Raises
    InputError for a stride outside 1 … window, or an unknown rule."""

    window: int
    stride: int
    bos: BosRule = "document"
    full_end: bool = False

    def __post_init__(self) -> None:
        if self.window < 2:
            raise InputError(f"--window {self.window}: a window holds at least 2 tokens")
        if not 0 < self.stride <= self.window:
            raise InputError(f"--stride must be between 1 and the window, {self.window}, not {self.stride}")
        if self.bos not in get_args(BosRule):
            raise InputError(f"--bos {self.bos!r} is none of {', '.join(get_args(BosRule))}")


@dataclass(frozen=True)
class Piece:
    """Tokens that are read together, all but the last; from place `first` on they are scored."""

    text: int
    ids: list[int]
    first: int


@dataclass
class Scored:
    """A document and what each of its tokens cost, -ln p, in order; without BOS its first token has no cost."""

    text: Text
    nats: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        return math.fsum(self.nats)


def windows(length: int, window: int, stride: int, full_end: bool = False) -> Iterator[tuple[int, int, int]]:
    """(start, end, first scored) triples over `length` tokens of which the first is given. The scored ranges tile
    1 … length-1 once; all but the last token of a triple, at most `window`, are what the model reads. Without overlap
    a window begins at the last token that the one before scored; the last one, with `full_end`, at what it can read."""
    scored = 1
    while scored < length:
        end = scored + (window if scored == 1 else stride)
        yield max(0, (min(length, end) if full_end else end) - 1 - window), min(length, end), scored
        scored = end


def pieces(text: int, ids: Sequence[int], cut: Cut, bos: int | None) -> list[Piece]:
    """A document's windows. Without a BOS token every rule is `none`."""
    whole = list(ids) if bos is None or cut.bos == "none" else [bos, *ids]
    found = []
    for start, end, first in windows(len(whole), cut.window, cut.stride, cut.full_end):
        # A BOS of its own takes the place of a window's first token.
        read = [bos, *whole[start + 1 : end]] if bos is not None and cut.bos == "window" else whole[start:end]
        found.append(Piece(text, read, first - start))
    return found


@torch.inference_mode()
def surprise(model: Llama, together: Sequence[Piece]) -> list[list[float]]:
    """-ln p of every scored token of every piece. Pieces are filled up at their ends, which nothing before sees."""
    longest = max(len(p.ids) for p in together)
    rows = torch.zeros(len(together), longest, dtype=torch.int64)
    for row, piece in zip(rows, together, strict=True):
        row[: len(piece.ids)] = torch.tensor(piece.ids)
    hidden = model.hidden(rows[:, :-1].to(model.device))
    states = torch.cat([h[p.first - 1 : len(p.ids) - 1] for h, p in zip(hidden, together, strict=True)])
    labels = torch.cat([row[p.first : len(p.ids)] for row, p in zip(rows, together, strict=True)])
    found = (-linear_log_probs(states, model.lm_head.weight, labels.to(model.device))).cpu()
    ends = iter(found.tolist())
    return [list(islice(ends, len(p.ids) - p.first)) for p in together]


def score(
    model: Llama, texts: Sequence[Text], cut: Cut, bos: int | None, batch: int = 1, quiet: bool = True
) -> list[Scored]:
    """What every token of every text cost; `batch` windows are read together."""
    found = [Scored(t) for t in texts]
    every = [piece for number, text in enumerate(texts) for piece in pieces(number, text.ids, cut, bos)]
    # Like lengths together: what fills a batch up is work for nothing.
    order = sorted(range(len(every)), key=lambda n: -len(every[n].ids))
    costs: list[list[float]] = [[]] * len(every)
    with progress("perplexity", sum(len(p.ids) for p in every) or 1, quiet) as advance:
        done = 0
        for at in range(0, len(order), batch):
            part = order[at : at + batch]
            for n, cost in zip(part, surprise(model, [every[n] for n in part]), strict=True):
                costs[n] = cost
                done += len(every[n].ids)
            advance(done)
    for piece, cost in zip(every, costs, strict=True):
        found[piece.text].nats += cost
    for scored in found:
        check_finite([scored.total], scored.text.name)
    return found


def perplexity(
    model: Llama,
    tokenizer: Tokenizer,
    texts: Sequence[str | Text],
    *,
    window: int | None = None,
    stride: int | None = None,
    bos: BosRule = "document",
    batch: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score `texts`. Returns token_perplexity, word_perplexity (words as spaces part them; None where they are too long
    for a number), byte_perplexity, bits_per_byte, tokens, words, bytes, `documents` (the same of each), the protocol,
    and a `warning` when no document fills a window. Raises InputError when there is nothing to score, CamelidError
    when the model gives no probability."""
    return measured(model, tokenizer, texts, window, stride, bos, batch, quiet)[0]


def measured(
    model: Llama, tokenizer: Tokenizer, texts: Sequence[str | Text], window: int | None = None,
    stride: int | None = None, bos: BosRule = "document", batch: int = 1, quiet: bool = False,
) -> tuple[dict[str, Any], list[Scored]]:  # fmt: skip
    """`perplexity`'s figures, and what every token cost."""
    context = model.config.max_position_embeddings
    if window is not None and window > context:
        raise InputError(f"--window {window}: the model takes at most {context} tokens")
    window = min(WINDOW, context) if window is None else window
    cut = Cut(window, window if stride is None else stride, bos)
    if batch < 1:
        raise InputError(f"--batch {batch}: at least 1 window is read at a time")
    named = encoded(
        [f"text {n + 1}" for n in range(len(texts))], [t if isinstance(t, str) else "" for t in texts], tokenizer
    )
    passages = [n if isinstance(t, str) else t for n, t in zip(named, texts, strict=True)]
    scored = score(model, passages, cut, tokenizer.bos_token_id, batch, quiet)
    each = [{"name": s.text.name} | figures([s]) for s in scored if s.nats]
    if not each or not any(d["bytes"] for d in each):
        raise InputError("there is no text to score: every document is empty, or a single token without BOS")
    rule = {"document": "BOS before each, not scored", "window": "BOS before each window, not scored"}
    said = rule.get(bos, "") if tokenizer.bos_token_id is not None else ""
    found = figures(scored) | {"documents": each}
    longest = max(d["tokens"] for d in each)
    if longest < cut.window:
        found["warning"] = f"no document fills the window: the longest has {longest} tokens of {cut.window}"
    found["protocol"] = (
        f"window {cut.window}, stride {cut.stride}, each of {len(passages)} documents by itself, "
        f"{said or 'no BOS, first token not scored'}, {measured_in(model, tokenizer)}"
    )
    return found, scored


def figures(scored: Sequence[Scored]) -> dict[str, Any]:
    """Perplexities over all of these documents together, and what they are counted over."""
    nats = math.fsum(s.total for s in scored)
    tokens = sum(len(s.nats) for s in scored)
    words = sum(len(s.text.text.split()) for s in scored)
    size = sum(len(s.text.text.encode()) for s in scored)
    return {
        "token_perplexity": _exp(nats / max(tokens, 1)),
        "word_perplexity": _exp(nats / max(words, 1)),
        "byte_perplexity": _exp(nats / max(size, 1)),
        "bits_per_byte": nats / math.log(2) / max(size, 1),
        "nats": nats, "tokens": tokens, "words": words, "bytes": size,
    }  # fmt: skip


def _exp(x: float) -> float | None:
    """None past what a float holds: a "word" of text without spaces can be that improbable."""
    return math.exp(x) if x < 700 else None
