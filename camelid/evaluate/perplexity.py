"""Perplexity per token, word and byte, and bits per byte, of a model on held-out text.

Each document is scored by itself: BOS first when the tokenizer has one, then windows of at most `window` tokens
that overlap by window - stride, so that every token is scored once, with at least window - stride tokens of
context except near the document's start. Byte-based figures count the UTF-8 bytes of the text as given and can be
compared between tokenizers; token perplexity cannot.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from camelid.errors import InputError
from camelid.model.llama import Llama
from camelid.report.progress import progress
from camelid.tokenizer.tokenizer import Tokenizer


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first scored) triples over `length` tokens; the scored ranges tile 1 … length-1 once."""
    scored = 1
    while scored < length:
        end = min(length, window) if scored == 1 else min(length, scored + stride)
        yield max(0, end - window), end, scored
        scored = end


@torch.inference_mode()
def negative_log_likelihood(model: Llama, ids: Sequence[int], window: int, stride: int) -> float:
    """Sum of -ln p(token | before it) over ids[1:], in nats."""
    total = 0.0
    for start, end, first in windows(len(ids), window, stride):
        piece = torch.tensor([ids[start:end]], device=model.device)
        hidden = model.hidden(piece)[0, first - start - 1 : -1]
        labels = piece[0, first - start :]
        total += F.cross_entropy(model.lm_head(hidden).float(), labels, reduction="sum").item()
    return total


def perplexity(
    model: Llama,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score `texts`. Returns token_perplexity, word_perplexity, byte_perplexity, bits_per_byte, tokens, words,
    bytes and the protocol. Raises InputError when there is nothing to score."""
    window = min(window or 2048, model.config.max_position_embeddings)
    stride = stride or window // 2
    if not 0 < stride < window:
        raise InputError(f"stride must be between 1 and window - 1 ({window - 1}), not {stride}")
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    nats, tokens, words, size = 0.0, 0, 0, 0
    with progress("perplexity", sum(len(t) for t in texts) or 1, quiet) as advance:
        done = 0
        for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
            whole = [*before, *ids]
            nats += negative_log_likelihood(model, whole, window, stride)
            tokens += max(0, len(whole) - 1)
            words += len(text.split())
            size += len(text.encode())
            done += len(text)
            advance(done)
    if not tokens or not size:
        raise InputError("there is no text to score")
    rule = "BOS first, not scored" if before else "no BOS, first token not scored"
    protocol = (
        f"window {window}, stride {stride}, each of {len(texts)} documents by itself, {rule}, "
        f"{str(model.dtype).removeprefix('torch.')}, tokenizer {tokenizer.digest()[:12]}"
    )
    return {
        "token_perplexity": _exp(nats / tokens),
        "word_perplexity": _exp(nats / max(words, 1)),
        "byte_perplexity": _exp(nats / size),
        "bits_per_byte": nats / math.log(2) / size,
        "tokens": tokens,
        "words": words,
        "bytes": size,
        "protocol": protocol,
    }


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
