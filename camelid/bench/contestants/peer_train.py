"""transformers' side of the training race: peer_train.py {S,M,L} FOLDER. With BENCH_BEST it is compiled and its memory
is kept, the best that its users know of; without, it is as its documentation shows it. On a GPU, where there is one."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from statistics import median

import process


def peak_bytes(device: str) -> int:
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak: int = process.peak_bytes()
    return peak


def main() -> None:
    best = bool(os.environ.get("BENCH_BEST"))
    if best:
        process.keep_memory()
    import numpy as np
    import torch
    import transformers

    folder = Path(sys.argv[2])
    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    narrow = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
    lora, version = os.environ.get("BENCH_TASK") == "lora", transformers.__version__
    dtype = torch.bfloat16 if lora and narrow else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype).train().to(device)
    if lora:
        import peft

        version = peft.__version__
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    run = torch.compile(model) if best else model
    before = peak_bytes(device)
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learned if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in learned if p.dim() < 2], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    rows, length = tokens.shape[1], tokens.shape[2] - 1
    seconds, losses = [], []
    for step in tokens:
        started = time.perf_counter()
        step = step.to(device)
        labels = step[:, 1:].clone()
        if lora:
            labels[:, torch.arange(labels.shape[1]) % 212 < 90] = -100
        with torch.autocast(device, torch.bfloat16, enabled=narrow):
            loss = run(input_ids=step[:, :-1], shift_labels=labels, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    peak = peak_bytes(device)
    print(json.dumps({"value": rows * length / median(seconds[1:]), "unit": "tokens/s",
                      "version": version, "first_step_seconds": seconds[0], "losses": losses,
                      "peak_bytes": peak, "peak_of_training": peak - before}))  # fmt: skip


main()
