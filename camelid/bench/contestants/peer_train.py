"""transformers' side of the training race: peer_train.py {S,M,L} FOLDER. With BENCH_BEST it is compiled and its memory
is kept, the best that its users know of; without, it is as its documentation shows it. On a GPU, where there is one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import process


def main() -> None:
    best = bool(os.environ.get("BENCH_BEST"))
    if best:
        process.keep_memory()
    import torch
    import train_protocol
    import transformers

    folder = Path(sys.argv[2])
    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    narrow = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
    lora, version = os.environ.get("BENCH_TASK") == "lora", transformers.__version__
    dtype = torch.bfloat16 if lora and narrow else torch.float32
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype).train().to(device)
    if lora:
        import peft

        version = peft.__version__
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    run = torch.compile(model) if best else model
    before = train_protocol.peak_bytes(device)
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learned if p.dim() >= 2]},
              {"params": [p for p in learned if p.dim() < 2], "weight_decay": 0.0}]  # fmt: skip

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(device)
        labels = train_protocol.labels_of(rows, lora)
        loss: torch.Tensor = run(input_ids=rows[:, :-1], shift_labels=labels, labels=labels, use_cache=False).loss
        return loss

    take = train_protocol.torch_step(loss_of, groups, device, narrow)
    train_protocol.race(train_protocol.tokens_of(folder), take, version, device, before)


main()
