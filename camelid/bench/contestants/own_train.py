"""camelid's side of the training race: own_train.py {S,M,L} FOLDER. BENCH_WITHOUT switches one technique off. On a GPU,
where there is one."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import numpy as np
import torch

from camelid import __version__
from camelid.formats.load import load
from camelid.kernels import cross_entropy, library
from camelid.kernels.memory import large_blocks
from camelid.model.llama import Llama
from camelid.model.lora import LoraConfig, adapt
from camelid.recipe import parse
from camelid.tokens.batch import IGNORE, Batch
from camelid.train.optimizer import optimizer_for
from camelid.train.parallel import Ranks
from camelid.train.plan import keeps_memory, peak_memory
from camelid.train.step import compute_dtype, train_step


def labels(step: torch.Tensor) -> torch.Tensor:
    """What is learned: everything, or for an adapter the answers, 122 of every 212 tokens."""
    found = step[:, 1:].clone()
    if os.environ.get("BENCH_TASK") == "lora":
        found[:, torch.arange(found.shape[1]) % 212 < 90] = IGNORE
    return found


def main() -> None:
    folder, without = Path(sys.argv[2]), os.environ.get("BENCH_WITHOUT", "")
    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    if without == "native":
        library.PATH = Path("none")
    if without == "chunks":
        cross_entropy.CHUNK_BYTES = dict.fromkeys(("cpu", "cuda"), 1 << 40)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lora = os.environ.get("BENCH_TASK") == "lora"
    model: Llama = load(folder / "model", dtype=compute_dtype(device, "auto") if lora else torch.float32).to(device)
    if lora:
        adapt(model, LoraConfig(r=16, lora_alpha=32.0))
    if device.type == "cuda" and without != "compile":
        for layer in model.layers:
            layer.compile()
    before = peak_memory(Ranks(device=device))
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    rows, length = tokens.shape[1], tokens.shape[2] - 1
    train = {"sequence_length": length, "global_batch_tokens": rows * length, "micro_batch_rows": rows, "steps": 99,
             "skip_sigma": 0.0}  # fmt: skip
    settings = parse({"train": train}).train
    optimizer = optimizer_for(model.train(), settings)
    seconds, losses = [], []
    with nullcontext() if without == "memory" else large_blocks(keeps_memory(model)):
        for step in tokens:
            started = time.perf_counter()
            batch = Batch(step[:, :-1], labels(step), torch.zeros(rows, length, dtype=torch.int64), True)
            losses.append(train_step(model, optimizer, batch, settings, 3e-4).loss)
            seconds.append(time.perf_counter() - started)
    peak = peak_memory(Ranks(device=device))
    print(json.dumps({"value": rows * length / median(seconds[1:]), "unit": "tokens/s", "version": __version__,
                      "first_step_seconds": seconds[0], "losses": losses, "peak_bytes": peak,
                      "peak_of_training": peak - before}))  # fmt: skip


main()
