"""Pages for a notebook's cells: a model's parts, a text cut into tokens, an answer coloured by its probabilities, a
run's curve. A notebook shows each, and `.write(path)` keeps it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from camelid.errors import InputError
from camelid.generate.engine import Result
from camelid.model.llama import Llama
from camelid.report.page import Curve, Page
from camelid.tokenizer.inspect import joined
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.train.log import METRICS, earlier

BITS_OF_FULL_RED = 8.0


def show_model(model: Llama) -> Page:
    """A model's shape, and where its weights are."""
    config = model.config
    page = Page(f"{model.num_parameters():,} weights, {str(model.dtype).removeprefix('torch.')}")
    names = (
        "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size", "max_position_embeddings", "rope_theta", "tie_word_embeddings",
    )  # fmt: skip
    page.table(["field", "value"], [(name, _shown(getattr(config, name))) for name in names])
    parts: Counter[str] = Counter()
    for name, weight in model.named_parameters():
        stem = name.split(".")
        parts["norms" if "norm" in name else stem[2] if stem[0] == "layers" else stem[0]] += weight.numel()
    page.bars("Weights", parts.most_common())
    return page


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def show_tokens(tokenizer: Tokenizer, text: str) -> Page:
    """A text with each token in a colour of its own; its id and name under the pointer."""
    offsets = tokenizer.offsets(text)
    page = Page(f"{len(offsets):,} tokens, {len(text):,} characters")
    page.spans(text, joined([(start, end, f"{i}: {tokenizer.token(i)}") for i, start, end in offsets]))
    return page


def show_probabilities(tokenizer: Tokenizer, result: Result) -> Page:
    """An answer, its tokens the redder the less likely each was; what else could have come under the pointer.

    Raises InputError when log-probabilities were not asked for (`SamplingParams(logprobs=5)`).
    """
    if result.logprobs is None:
        raise InputError("the result has no log-probabilities: ask with SamplingParams(logprobs=5)")
    text, spans, at = tokenizer.decode(result.ids, skip_special_tokens=True), list[tuple[int, int, float, str]](), 0
    for number, found in enumerate(result.logprobs, 1):
        # A character whose last bytes are still to come is not there yet: it belongs to the token that ends it.
        end = _alike(tokenizer.decode(result.ids[:number], skip_special_tokens=True), text)
        others = ", ".join(f"{tokenizer.decode([i])!r} {math.exp(log):.1%}" for i, log in found.top)
        label = f"{math.exp(found.logprob):.1%}; {others}"
        if end > at:
            spans.append((at, end, -found.logprob / math.log(2) / BITS_OF_FULL_RED, label))
        at = max(at, end)
    mean = sum(found.logprob for found in result.logprobs) / max(1, len(result.logprobs))
    page = Page(f"{len(result.ids)} tokens, perplexity {math.exp(-mean):.2f}")
    page.heat(text, spans)
    return page


def _alike(a: str, b: str) -> int:
    """How many letters two texts begin with alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def show_run(run: str | Path) -> Page:
    """The losses of a run folder, so far. Raises InputError when there are none."""
    path = Path(run) / METRICS
    if not path.is_file():
        raise InputError(f"{path} is missing: {run} is not a run of pretrain or finetune")
    points: dict[str, list[tuple[float, float]]] = {}
    for record in earlier(path):
        held_out = {f"held-out {name}": value for name, value in record.get("held_out", {}).items()}
        told = {"loss": record.get("loss"), **held_out}
        for name, value in told.items():
            if isinstance(value, int | float) and "loss" in name:
                points.setdefault(name, []).append((record["step"], value))
    curves = [Curve(name, [x for x, _ in at], [y for _, y in at]) for name, at in points.items()]
    if not curves:
        raise InputError(f"{path} holds no step yet")
    page = Page(Path(run).name)
    page.plot("Loss", curves, "step")
    return page
