"""Pre-training: a fresh model on packed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from camelid.errors import InputError, RecipeError
from camelid.formats.load import load_tokenizer
from camelid.model.config import LlamaConfig
from camelid.model.init import initialize
from camelid.model.llama import Llama
from camelid.recipe import DataSection, EvaluateSection, Recipe, TrainSection
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.batch import PackedTokens
from camelid.tokens.mixture import Mixture
from camelid.train.loop import run
from camelid.train.loss import mean_loss
from camelid.train.parallel import Ranks, check_heads, ranks, shard, spread
from camelid.train.step import Check, Job, check_float8, micro_rows, own_rows

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def model_config(recipe: Recipe, tokenizer: Tokenizer) -> LlamaConfig:
    """The shape a recipe asks for, with the tokenizer's vocabulary and special ids."""
    changes = recipe.model.shape() | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if recipe.model.size:
        config = LlamaConfig.named(recipe.model.size, **changes)
    elif missing := [f"model.{key}" for key in SHAPE if key not in changes]:
        told = "which model" if len(missing) == len(SHAPE) else f"all of the model's shape: {', '.join(missing)}"
        raise RecipeError(f"the recipe does not say {told}: set model.size, or {', '.join(SHAPE)}")
    else:
        config = LlamaConfig(**changes)
    if recipe.train.sequence_length > config.max_position_embeddings:
        raise RecipeError(
            f"train.sequence_length {recipe.train.sequence_length} is longer than the model's "
            f"max_position_embeddings {config.max_position_embeddings}: raise the one or lower the other"
        )
    return config


def pretrain(recipe: Recipe, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train a new model on `data.tokens`. Returns the run's summary (see `loop.run`)."""
    folders = token_folders(recipe)
    with ranks(recipe.parallel) as who:
        return run(pretraining(recipe, folders, who, quiet), resume, who)


def pretraining(recipe: Recipe, folders: Sequence[Path], who: Ranks, quiet: bool = False, weights: bool = True) -> Job:
    """A fresh model, spread over the ranks, on the rows of `folders`; without `weights` it has its shape only."""
    check_begins(recipe)
    check_float8(recipe, who, here=weights)
    source = token_source(recipe, folders)
    tokenizer = load_tokenizer(folders[0] / "tokenizer")
    config = model_config(recipe, tokenizer)
    with torch.device("meta"):
        model = Llama(config)
    if weights:  # drawn tensor by tensor: the same for any number of ranks, and none of them ever holds them all
        shard(model, who)
        model.to_empty(device=who.device)
        model.tie()
        torch.manual_seed(recipe.train.seed)
        initialize(model, model.config, put=lambda parameter, whole: parameter.copy_(spread(whole, parameter)))
    else:
        check_heads(model, who)  # as spreading it would
    check = checker(source, recipe.train, who) if recipe.data.held_out else None
    return Job(model, tokenizer, source, recipe, list(folders), quiet=quiet, check=check)


def checker(source: PackedTokens | Mixture, settings: TrainSection, who: Ranks) -> Check:
    """The loss on rows that are held out, the same ones every time and on every rank; of several folders each one's,
    and their mean by weight."""
    folders = source.sources if isinstance(source, Mixture) else [source]
    shares = source.shares if isinstance(source, Mixture) else [1.0]
    # No more at once than in a step, whose memory is planned.
    at_once = min(micro_rows(settings), own_rows(settings, who.data_world))

    def loss(model: Llama, folder: PackedTokens) -> float:
        rows = folder.held
        return mean_loss(model, (folder.rows(rows[n : n + at_once]) for n in range(0, len(rows), at_once)), who)

    def check(model: Llama) -> dict[str, float]:
        losses = [loss(model, folder) for folder in folders]
        found = {"loss": sum(share * one for share, one in zip(shares, losses, strict=True))}
        if len(folders) > 1:
            found |= {f"loss on {one.folder}": value for one, value in zip(folders, losses, strict=True)}
        return found

    return check


def check_begins(recipe: Recipe) -> None:
    """Raise RecipeError when it says what only a fine-tuning heeds."""
    said: dict[str, object] = {
        "model.from": recipe.model.from_, "[finetune]": recipe.finetune, "data.files": recipe.data.files,
        "data.max_bad_share": recipe.data.max_bad_share != DataSection().max_bad_share,
        "[evaluate] beside every": recipe.evaluate != EvaluateSection(every=recipe.evaluate.every),
    }  # fmt: skip
    if named := [name for name, value in said.items() if value]:
        raise RecipeError(
            f"{' and '.join(named)}: this recipe is of a fine-tuning (camelid finetune); pre-training begins a new "
            "model on data.tokens"
        )


def token_folders(recipe: Recipe) -> list[Path]:
    """The folders that `data.tokens` names. Raises RecipeError when there is none."""
    named = recipe.data.tokens
    if not named:
        raise RecipeError("the recipe lacks data.tokens, a folder from `camelid tokens build`")
    return [Path(name) for name in ([named] if isinstance(named, str) else named)]


def token_source(recipe: Recipe, folders: Sequence[Path]) -> PackedTokens | Mixture:
    """The rows of one tokens folder, or of several by weight. Raises InputError when their tokenizers differ."""
    length, seed, weights = recipe.train.sequence_length, recipe.train.seed, recipe.data.weights
    sources = [PackedTokens(folder, length, seed, recipe.data.held_out) for folder in folders]
    digests = [source.index["tokenizer_digest"] for source in sources]
    for folder, digest in zip(folders, digests, strict=True):
        if digest != digests[0]:
            raise InputError(f"data.tokens: {folder} and {folders[0]} were made with different tokenizers")
    if len(sources) == 1 and not weights:
        return sources[0]
    return Mixture(sources, weights, seed)


def planned(recipe: Recipe, who: Ranks, weights: bool) -> Job:
    """The job as `camelid plan` looks at it."""
    return pretraining(recipe, token_folders(recipe), who, quiet=True, weights=weights)
