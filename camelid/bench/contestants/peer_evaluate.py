"""transformers' side (perplexity, as its documentation shows it) and lm-eval's (choice, by its own class for Hugging
Face models) of the evaluation race: peer_evaluate.py {perplexity,choice} FOLDER. With BENCH_BEST the model is compiled
and its memory kept, or questions are read in batches."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import process


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    best = bool(os.environ.get("BENCH_BEST"))
    if best:
        process.keep_memory()
    import torch

    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    found = (perplexity if task == "perplexity" else choice)(folder, os.environ["BENCH_DTYPE"], best)
    peak = process.peak_bytes()
    print(json.dumps(found | {"peak_bytes": peak}))


def perplexity(folder: Path, dtype: str, best: bool) -> dict[str, Any]:
    import numpy as np
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype))
    run = torch.compile(model.eval()) if best else model.eval()
    ids = torch.from_numpy(np.load(folder / "tokens.npy")).long()
    window = int(os.environ["BENCH_WINDOW"])

    def nats_of(ids: Any) -> float:
        total = 0.0
        for start in range(0, len(ids) - 1, window):
            read, labels = ids[start : start + window], ids[start + 1 : start + window + 1]
            read = read[: len(labels)]
            # Its cache stays on: without it the compiled model is a quarter slower, and the plain one no faster.
            loss = run(input_ids=read[None], shift_labels=labels[None], labels=labels[None]).loss
            total += float(loss) * len(labels)
        return total

    with torch.inference_mode():
        nats_of(ids[: window + 1])
        nats_of(ids[: window + 1])
        started = time.perf_counter()
        nats = nats_of(ids)
        seconds = time.perf_counter() - started
    return {"value": (len(ids) - 1) / seconds, "unit": "tokens/s", "nats": nats, "version": transformers.__version__}


def choice(folder: Path, dtype: str, best: bool) -> dict[str, Any]:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder / "model"), dtype=dtype, batch_size=16 if best else 1, device="cpu")
    asked = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    pairs = [(context, answer) for context, answers in asked for answer in answers]
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    model.loglikelihood(requests[:8], disable_tqdm=True)
    started = time.perf_counter()
    sums = [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]
    seconds = time.perf_counter() - started
    return {"value": len(asked) / seconds, "unit": "questions/s", "nats": -sum(sums), "version": lm_eval.__version__}


main()
