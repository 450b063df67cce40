"""From one wish to a recipe: a time on this machine, or a depth, gives shape, tokens, batch and learning rate.

The rule is plain and stated, not tuned for each case: 64 of width for each layer (nanochat's ratio), 20 tokens for each
weight (Chinchilla, arXiv:2203.15556), about a thousand steps or more, and a rate that falls as 1 / width (muP,
arXiv:2203.03466, for AdamW; Muon's does not depend on the width).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from camelid.artifact import read_manifest
from camelid.errors import InputError
from camelid.formats.load import finished, load_tokenizer
from camelid.kernels.device import best_device
from camelid.model.config import LlamaConfig
from camelid.recipe import LENGTHS, SIZES, Recipe, load, parse
from camelid.train.log import flops_per_token, peak_flops
from camelid.train.pretrain import check_begins, token_folders

CHOSEN = (*LENGTHS, "global_batch_tokens", "learning_rate", "optimizer", "warmup_steps")
TOKENS_PER_WEIGHT, EFFICIENCY = 20, 0.5  # the share of a matrix product's speed that whole steps reach
DEEPEST = 40


def seconds(text: str) -> float:
    """ "2h", "45m", "1h30m", "90s" in seconds. Raises InputError for anything else."""
    parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip())
    if not parts or not text.strip():
        raise InputError(f"--budget {text!r} is not a time: write 2h, 45m or 1h30m")
    return sum(float(value or 0) * unit for value, unit in zip(parts.groups(), (3600, 60, 1), strict=True))


def shape(depth: int) -> dict[str, Any]:
    """A LLaMA of `depth` layers: width 64 * depth, heads of 64, SwiGLU of 8/3 the width."""
    width = 64 * depth
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": depth,
        "num_key_value_heads": depth,
        "intermediate_size": -(-8 * width // 3 // 64) * 64,
        "tie_word_embeddings": depth < 24,
    }


def wished(
    path: str | Path, settings: Sequence[str], budget: str | None, depth: int | None, resume: bool = False,
    quiet: bool = False,
) -> Recipe:  # fmt: skip
    """The recipe at `path` with the settings over it, as it is without a wish; else with what `choose` makes of it, or
    made of it when the run began that is resumed."""
    if budget is None and depth is None:
        return load(path, settings)
    recipe = load(path, [*settings, "train.optimizer=muon"])
    return (_as_begun(recipe, settings) if resume else None) or choose(recipe, budget, depth, quiet)


def _as_begun(recipe: Recipe, settings: Sequence[str]) -> Recipe | None:
    """`recipe` with what was chosen when its run began, but for what the settings say now; None when there is no
    checkpoint yet."""
    folder = next(iter(finished(Path(recipe.log.out))), None)
    if folder is None:
        return None
    said = {setting.partition("=")[0].removeprefix("train.") for setting in settings}
    chosen = [key for key in CHOSEN if key not in said]
    then, now = read_manifest(folder)["settings"], recipe.settings()
    train = {key: value for key, value in now["train"].items() if key not in chosen}
    train |= {key: value for key, value in then["train"].items() if key in chosen}
    return parse(now | {"model": then["model"], "train": train})


def choose(recipe: Recipe, budget: str | None, depth: int | None, quiet: bool = False) -> Recipe:
    """`recipe` with model, batch, length of training and rate set. With both, the depth is kept and the time bounds the
    training."""
    check_begins(recipe)
    folders = token_folders(recipe)
    if budget is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--budget times one process; choose with `camelid plan --budget`, then set model and train")
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    if depth is not None and not 1 <= depth <= DEEPEST:
        raise InputError(f"--depth {depth} is not between 1 and {DEEPEST}")
    vocab, length = len(load_tokenizer(folders[0] / "tokenizer")), recipe.train.sequence_length
    device = best_device()
    speed, named = peak_flops(device)
    own = {k: v for k, v in recipe.settings().get("model", {}).items() if k != "size" and k not in SIZES}
    work = seconds(budget) * speed * EFFICIENCY if budget is not None else None

    def cost(layers: int) -> tuple[int, float]:
        config = LlamaConfig(vocab_size=vocab, **(shape(layers) | own))
        tokens = TOKENS_PER_WEIGHT * config.num_parameters()
        return tokens, tokens * flops_per_token(config, length)

    if depth is None:
        assert work is not None
        depth = max((d for d in range(1, DEEPEST + 1) if cost(d)[1] <= work), default=1)
    tokens, _ = cost(depth)
    batch = max(length, min(524_288, 1 << (tokens // 1000).bit_length() - 1) // length * length)
    rate = min(6e-3, 3e-3 * 256 / (64 * depth))
    train = recipe.train.model_dump(exclude_none=True) | {
        "global_batch_tokens": batch, "learning_rate": rate, "optimizer": "muon",
        "warmup_steps": max(1, tokens // batch // 50),
    }  # fmt: skip
    for key in LENGTHS:
        train.pop(key, None)
    train |= {"steps": max(1, tokens // batch)} if budget is None else {"minutes": seconds(budget) / 60}
    raw = recipe.settings() | {"model": shape(depth) | own, "train": train}
    if not quiet:
        goal = f"{budget} at half of {named}" if budget is not None else f"{tokens:,} tokens, 20 a weight"
        print(
            f"{depth} layers of width {64 * depth} for {goal}: batches of {batch:,} tokens, rate {rate:.2g} "
            f"(Muon {recipe.train.muon_learning_rate:g})",
            file=sys.stderr,
        )
    return parse(raw)
