"""The Llama-3 kind of tokenizer: BPE over bytes, after a regular expression has cut the text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from camelid.kernels import bpe
from camelid.tokenizer.native import classes
from camelid.tokenizer.patterns import LLAMA3, byte_to_character

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import Model


def learn(texts: Iterable[str], vocab_size: int, specials: Sequence[str], threads: int | None = None) -> Backend:
    """A tokenizer of at most `vocab_size` tokens: `specials`, the 256 bytes, then the merges learned from the texts.

    The native library learns the same merges as `tokenizers`, which does it when the library is not there; but for
    pieces of more than 4096 bytes, which it leaves out and says so.
    """
    from tokenizers import models

    if not bpe.ready(classes):
        return learn_reference(texts, vocab_size, specials)
    alphabet = sorted(byte_to_character())  # the library's order
    place = {c: len(specials) + i for i, c in enumerate(alphabet)}
    byte_ids = np.array([place[c] for c in byte_to_character()], dtype=np.uint32)
    tokens = [b""] * (len(specials) + 256)
    for byte, number in enumerate(byte_ids):
        tokens[number] = bytes([byte])
    base = bpe.NativeBpe(tokens, np.empty((0, 3), dtype=np.uint32), byte_ids, bpe.LLAMA3)
    counter = bpe.PieceCounter(bpe.LLAMA3, threads)
    counter.add(texts)
    if counter.skipped:
        print(f"{counter.skipped:,} pieces of more than 4096 bytes were not learned from", file=sys.stderr)
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    names = list(vocab)
    merges = []
    for left, right, result in counter.learn(base, vocab_size).tolist():
        merges.append((names[left], names[right]))
        if result == len(names):
            names.append(names[left] + names[right])
            vocab[names[-1]] = result
    return pipeline(models.BPE(vocab, merges), specials)


def learn_reference(texts: Iterable[str], vocab_size: int, specials: Sequence[str]) -> Backend:
    """`learn` by the trainer of the `tokenizers` library."""
    from tokenizers import models, pre_tokenizers, trainers

    backend = pipeline(models.BPE(), ())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def pipeline(model: Model, specials: Iterable[str]) -> Backend:
    """The steps around a byte-level BPE model: Llama 3's cut, bytes as characters, and back."""
    from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(model)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), plain])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials])
    return backend


def from_ranks(ranks: Mapping[bytes, int], specials: Sequence[str]) -> Backend:
    """The tokenizer of a tiktoken vocabulary: bytes of each token -> rank, `specials` numbered after them.

    Every way to put a token together is a merge, the tokens in order of rank: what tiktoken does with ranks alone.
    """
    from tokenizers import models

    shown = byte_to_character()
    merges = []
    for token in sorted(ranks, key=lambda t: ranks[t]):
        ways = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += sorted(ways, key=lambda way: (ranks[way[0]], ranks[way[1]]))
    name = {token: "".join(shown[b] for b in token) for token in ranks}
    vocab = {name[token]: rank for token, rank in ranks.items()}
    pairs = [(name[left], name[right]) for left, right in merges]
    return pipeline(models.BPE(vocab, pairs, ignore_merges=True), specials)
