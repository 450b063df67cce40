"""camelid's side of the evaluation race: own_evaluate.py {perplexity,choice} FOLDER."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import process
import torch

from camelid import __version__
from camelid.evaluate.choice import Question, choice
from camelid.evaluate.perplexity import Cut, score
from camelid.evaluate.texts import Text
from camelid.formats.load import load, load_tokenizer
from camelid.model.llama import Llama


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    model: Llama = load(folder / "model", dtype=getattr(torch, os.environ["BENCH_DTYPE"]))
    if task == "perplexity":
        ids = np.load(folder / "tokens.npy").tolist()
        window = int(os.environ["BENCH_WINDOW"])
        score(model, [Text("", "", ids[:window])], Cut(window, window), None)
        started = time.perf_counter()
        [scored] = score(model, [Text("", "", ids)], Cut(window, window), None)
        seconds = time.perf_counter() - started
        found = {"value": len(scored.nats) / seconds, "unit": "tokens/s", "nats": scored.total}
    else:
        tokenizer = load_tokenizer(folder / "model")
        asked = [
            Question(prompt, answers, 0)
            for prompt, answers in json.loads((folder / "questions.json").read_text(encoding="utf-8"))
        ]
        choice(model, tokenizer, asked[:2])
        started = time.perf_counter()
        sums = [x for answer in choice(model, tokenizer, asked)["answers"] for x in answer["log_likelihoods"]]
        seconds = time.perf_counter() - started
        found = {"value": len(asked) / seconds, "unit": "questions/s", "nats": -sum(sums)}
    peak = process.peak_bytes()
    print(json.dumps(found | {"version": __version__, "peak_bytes": peak}))


main()
