"""camelid's side of the training race: own_train.py {S,M,L} FOLDER. BENCH_WITHOUT switches one technique off, and
BENCH_BASE keeps what an adapter stands on in int8. On a GPU, where there is one."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import train_protocol

from camelid import __version__
from camelid.formats.load import load
from camelid.kernels import cross_entropy, library
from camelid.kernels.crumbs import begin_without
from camelid.kernels.memory import large_blocks
from camelid.model.llama import Llama
from camelid.model.lora import LoraConfig, adapt
from camelid.model.quantized import multiply_head_in_bytes, quantize_layers
from camelid.recipe import parse
from camelid.tokens.batch import Batch
from camelid.train.optimizer import optimizer_for
from camelid.train.plan import keeps_memory
from camelid.train.step import compute_dtype, train_step


def main() -> None:
    folder, without = Path(sys.argv[2]), os.environ.get("BENCH_WITHOUT", "")
    if without != "memory":
        begin_without()  # as `camelid pretrain` does
    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    if without == "native":
        library.PATH = Path("none")
    if without == "chunks":
        cross_entropy.CHUNK_BYTES = dict.fromkeys(("cpu", "cuda"), 1 << 40)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lora = os.environ.get("BENCH_TASK") == "lora"
    model: Llama = load(folder / "model", dtype=compute_dtype(device, "auto") if lora else torch.float32).to(device)
    if os.environ.get("BENCH_BASE") == "int8":
        quantize_layers(model, 8, None, rounds_inputs=False)
        multiply_head_in_bytes(model, device)
    if lora:
        adapt(model, LoraConfig(r=16, lora_alpha=32.0))
    if device.type == "cuda" and without != "compile":
        for layer in model.layers:
            layer.compile()
    before = train_protocol.peak_bytes(device.type)
    tokens = train_protocol.tokens_of(folder)
    rows, length = tokens.shape[1], tokens.shape[2] - 1
    train = {"sequence_length": length, "global_batch_tokens": rows * length, "micro_batch_rows": rows, "steps": 99,
             "skip_sigma": 0.0}  # fmt: skip
    settings = parse({"train": train}).train
    optimizer = optimizer_for(model.train(), settings)
    pieces = torch.zeros(rows, length, dtype=torch.int64)  # one a row

    def take(step: torch.Tensor) -> float:
        batch = Batch(step[:, :-1], train_protocol.labels_of(step, lora), pieces, True)
        return train_step(model, optimizer, batch, settings, 3e-4).loss

    with nullcontext() if without == "memory" else large_blocks(keeps_memory(model)):
        train_protocol.race(tokens, take, __version__, device.type, before)


main()
