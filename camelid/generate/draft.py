"""Guesses at the next tokens by a smaller model of the same vocabulary (speculative decoding, arXiv:2211.17192). The
model that is asked reads them all in one step and chooses each token as it would have without; a guess that is the same
has saved a step. So the draft always guesses its likeliest token, and no text depends on it, drawn ones neither: in the
native decoder bit for bit, in torch up to the order of sums, as with any other neighbours in a batch.

The draft keeps its keys and values in pages of the same numbers as the model, so what is shared, sent back or freed
there is so here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from camelid.errors import InputError
from camelid.generate.runner import Chunk, Runner, depends_on_length
from camelid.tokenizer.tokenizer import Tokenizer

MOST = 8  # guesses a step
LEAST = 0.1  # a guess is made while the draft holds all of them together for at least that likely


class Draft:
    """A runner that guesses for the model whose vocabulary has `vocab_size` tokens. Raises InputError for one that
    cannot."""

    def __init__(self, runner: Runner, vocab_size: int) -> None:
        if depends_on_length(runner.config):
            raise InputError("a model whose rope scaling is dynamic cannot be a draft")
        self.runner, self._shared = runner, min(vocab_size, runner.config.vocab_size)

    @property
    def context(self) -> int:
        """Tokens beyond which it guesses nothing."""
        return self.runner.config.max_position_embeddings

    def read(self, chunks: Sequence[Chunk]) -> None:
        """Know what the model is just reading."""
        if chunks:
            self.runner.run([self._own(chunk, wanted=0) for chunk in chunks])

    def guess(self, texts: Sequence[Chunk], most: Sequence[int]) -> list[list[int]]:
        """What may follow each text, at most so many tokens. A chunk holds what the draft has not read of a text: its
        last token, and the last guess before it if all came true. It reads its own guesses but the last."""
        found: list[list[int]] = [[] for _ in texts]
        likely = [1.0] * len(texts)
        next_up = {number: self._own(text, wanted=1) for number, text in enumerate(texts) if most[number] > 0}
        while next_up:
            logits = torch.cat(self.runner.run(list(next_up.values())))[:, : self._shared].float()
            chances, tokens = logits.softmax(-1).max(-1)
            going = {}
            for (number, chunk), chance, token in zip(next_up.items(), chances.tolist(), tokens.tolist(), strict=True):
                likely[number] *= chance
                if likely[number] >= LEAST:  # a chance that is no number is not
                    found[number].append(token)
                    if len(found[number]) < most[number]:
                        end = chunk.position + len(chunk.ids)
                        going[number] = replace(chunk, ids=[token], position=end)
            next_up = going
        return found

    def _own(self, chunk: Chunk, wanted: int) -> Chunk:
        """The chunk as the draft reads it: with its own adapter, and some token for one that it does not have."""
        ids = [i if i < self.runner.config.vocab_size else 0 for i in chunk.ids]
        return replace(chunk, ids=ids, wanted=wanted, adapter=self.runner.active)


def check_same(tokenizer: Tokenizer, draft: Tokenizer, name: str) -> None:
    """Raise InputError when an id is one token here and another there."""
    ours, theirs = _tokens(tokenizer), _tokens(draft)
    other = next((i for i in sorted(ours.keys() & theirs.keys()) if ours[i] != theirs[i]), None)
    if other is not None:
        raise InputError(
            f"{name}: token {other} is {theirs[other]!r} there, {ours[other]!r} in the model: a draft needs the same "
            "vocabulary"
        )


def _tokens(tokenizer: Tokenizer) -> Mapping[int, str]:
    return {i: token for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
