"""camelid's side of the token race: own_tokens.py {encode,train} DOCUMENTS.jsonl."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from camelid import __version__
from camelid.tokenizer.byte_level import learn
from camelid.tokenizer.load import from_folder


def main() -> None:
    task, path = sys.argv[1], Path(sys.argv[2])
    with path.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    if task == "train":
        vocab_size = int(os.environ["BENCH_VOCAB_SIZE"])
        started = time.perf_counter()
        learn(texts, vocab_size, [], threads=1)
        seconds, extra = time.perf_counter() - started, {}
    else:
        threads = int(os.environ["BENCH_THREADS"])
        tokenizer = from_folder(path.parent)
        native = tokenizer._native
        if native is None:
            raise SystemExit("the native library is not there")
        warm, texts = texts[::2], texts[1::2]
        native.encode(warm[:1], threads)
        started = time.perf_counter()
        native.encode(warm, threads)
        middle = time.perf_counter()
        ids, _ = native.encode(texts, threads)
        seconds = time.perf_counter() - middle
        cold = sum(len(t.encode()) for t in warm) / (middle - started) / 1e6
        extra = {"cold": cold, "ids": hashlib.sha256(ids.tobytes()).hexdigest()[:16]}
    size = sum(len(text.encode()) for text in texts)
    print(json.dumps({"value": size / seconds / 1e6, "unit": "MB/s", "version": __version__, **extra}))


main()
