"""The peers' side of the token race; BENCH_NAME says which library it is."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


def encoder(name: str, folder: Path, threads: int) -> Callable[[list[str]], Any]:
    """A function that encodes texts the library's own fastest way."""
    if name == "tokenizers":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda texts: tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    if name == "tiktoken":
        import tiktoken

        ranks = {
            base64.b64decode(t): int(r)
            for t, r in json.loads((folder / "ranks.json").read_text(encoding="utf-8")).items()
        }
        pattern = (folder / "pattern.txt").read_text(encoding="utf-8")
        encoding = tiktoken.Encoding("bench", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        return lambda texts: encoding.encode_ordinary_batch(texts, num_threads=threads)
    import gigatoken

    giga = gigatoken.Tokenizer(folder / "tokenizer.json")
    return lambda texts: giga.encode_batch(texts, parallel=threads > 1)


def flat(name: str, found: Any) -> Any:
    """All ids end to end, to compare."""
    if name == "gigatoken":
        import awkward

        return np.asarray(awkward.flatten(found)).astype(np.uint32)
    lists = [e.ids for e in found] if name == "tokenizers" else found
    return np.array([i for ids in lists for i in ids], dtype=np.uint32)


def train(name: str, texts: list[str]) -> None:
    """Learn merges from the texts."""
    size, pattern = int(os.environ["BENCH_VOCAB_SIZE"]), os.environ["BENCH_PATTERN"]
    if name == "rustbpe":
        import rustbpe

        rustbpe.Tokenizer().train_from_iterator(iter(texts), size, pattern=pattern)
        return
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), plain])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)


def main() -> None:
    name, path = os.environ["BENCH_NAME"], Path(sys.argv[2])
    with path.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    if sys.argv[1] == "train":
        started = time.perf_counter()
        train(name, texts)
        seconds, extra = time.perf_counter() - started, {}
    else:
        encode = encoder(name, path.parent, int(os.environ["BENCH_THREADS"]))
        warm, texts = texts[::2], texts[1::2]
        encode(warm[:1])
        started = time.perf_counter()
        encode(warm)
        middle = time.perf_counter()
        found = encode(texts)
        seconds = time.perf_counter() - middle
        cold = sum(len(t.encode()) for t in warm) / (middle - started) / 1e6
        extra = {"cold": cold, "ids": hashlib.sha256(flat(name, found).tobytes()).hexdigest()[:16]}
    size = sum(len(text.encode()) for text in texts)
    print(json.dumps({"value": size / seconds / 1e6, "unit": "MB/s", "version": version(name), **extra}))


main()
