"""What rounding costs: perplexity before and after, how far the distributions part (KL divergence), how often the
likeliest token is another."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from camelid.evaluate.opened import check_finite
from camelid.evaluate.perplexity import Piece
from camelid.generate.cache import KVCache
from camelid.kernels.decoder import PAGE
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.quantized import QuantizedLinear, quantized

ROWS = 256  # of logits at a time


def _nobody() -> None:
    pass


@torch.inference_mode()
def states_of(
    model: Llama, pieces: Sequence[Piece], tell: Callable[[], None] = _nobody, kv_cache: bool = False
) -> list[Tensor]:
    """The last states of every scored token of every piece, [tokens, hidden]. `tell` is called after each piece. With
    `kv_cache` keys and values are rounded to int8, as the engine keeps them if asked to."""
    found = []
    for piece in pieces:
        ids = torch.tensor([piece.ids[:-1]])
        hidden = model.hidden(ids, cache=_rounding(model.config, ids.shape[1]) if kv_cache else None)[0]
        found.append(hidden[piece.first - 1 :].clone())
        tell()
    return found


def _rounding(config: LlamaConfig, tokens: int) -> KVCache:
    cache = KVCache(config, integers=True)
    cache.select([0], [range(-(-tokens // PAGE))])
    return cache


@torch.inference_mode()
def compare(
    full: Llama, before: Sequence[Tensor], rounded: Llama, pieces: Sequence[Piece],
    tell: Callable[[], None] = _nobody, kv_cache: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """`before` are `states_of(full, pieces)`. Returns token_perplexity of both, kl (mean, nats, from full to rounded),
    kl_p999 (what 99.9 % of tokens stay below), top1_agreement and tokens. Raises CamelidError when there is no
    number. `kv_cache` is of `rounded`, as in `states_of`."""
    nats: dict[str, float] = {"before": 0.0, "after": 0.0}
    kls, same = [], 0
    after = states_of(rounded, pieces, tell, kv_cache)
    for piece, old, new in zip(pieces, before, after, strict=True):
        labels = torch.tensor(piece.ids[piece.first :])
        for at in range(0, len(labels), ROWS):
            rows = slice(at, at + ROWS)
            p = full.lm_head(old[rows]).float().log_softmax(-1)
            q = rounded.lm_head(new[rows]).float().log_softmax(-1)
            kls.append((p.exp() * (p - q)).sum(-1))
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            nats["before"] -= float(p.gather(1, labels[rows, None]).double().sum())
            nats["after"] -= float(q.gather(1, labels[rows, None]).double().sum())
    kl = torch.cat(kls).clamp_min(0)
    check_finite([*nats.values(), float(kl.sum())], "the text that quantising is measured on")
    return {
        "token_perplexity_before": math.exp(nats["before"] / len(kl)),
        "token_perplexity_after": math.exp(nats["after"] / len(kl)),
        "kl": float(kl.mean()),
        "kl_p999": float(kl.sort().values[math.ceil(0.999 * len(kl)) - 1]),
        "top1_agreement": same / len(kl),
        "tokens": len(kl),
    }


def sensitivity(
    full: Llama, before: Sequence[Tensor], pieces: Sequence[Piece], bits: int, group: int | None, symmetric: bool
) -> list[dict[str, Any]]:
    """The mean KL divergence when one layer's weights alone are rounded to nearest, for every layer."""
    found = []
    for number, layer in enumerate(full.layers):
        kept = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        for name, linear in kept.items():
            rounded = quantized(linear, bits, group or linear.in_features, symmetric, rounds_inputs=True)
            _put(layer, name, rounded)
        measured = compare(full, before, full, pieces)
        for name, linear in kept.items():
            _put(layer, name, linear)
        found.append({"layer": number, "kl": measured["kl"], "top1_agreement": measured["top1_agreement"]})
    return found


def _put(layer: torch.nn.Module, name: str, module: torch.nn.Linear | QuantizedLinear) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(layer.get_submodule(parent), leaf, module)


def shared_copy(model: Llama) -> Llama:
    """The same model with the same weights, whose layers can be replaced without touching the first one's."""
    memo = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)
