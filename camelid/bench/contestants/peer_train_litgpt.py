"""litgpt's side of the training race: peer_train_litgpt.py {S,M} FOLDER. Its model and its loss as its
`pretrain` has them: compiled, the loss eager in chunks, weights float32 under bfloat16; the optimizer fused, which it
is on a GPU only. With BENCH_BEST its memory is kept."""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import process


def main() -> None:
    best = bool(os.environ.get("BENCH_BEST"))
    if best:
        process.keep_memory()
    import numpy as np
    import torch
    from litgpt import GPT, Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    folder = Path(sys.argv[2])
    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    shape = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    rows, length = tokens.shape[1], tokens.shape[2] - 1
    config = Config(
        block_size=length, n_layer=shape["num_hidden_layers"], n_head=shape["num_attention_heads"],
        n_query_groups=shape["num_key_value_heads"], n_embd=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"], padded_vocab_size=shape["vocab_size"], rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_eps=shape["rms_norm_eps"],
        mlp_class_name="LLaMAMLP", rope_base=int(shape["rope_parameters"]["rope_theta"]),
    )  # fmt: skip
    model: Any = GPT(config)
    weights: dict[str, torch.Tensor] = {}
    halves: dict[Any, Any] = {}  # of q, k and v, until all three are read
    for part in sorted((folder / "model").glob("*.safetensors")):
        copy_weights_hf_llama(config, halves, weights, load_file(part), dtype=torch.float32)
    model.load_state_dict(weights)
    del weights  # else they would count as its memory
    if shape["tie_word_embeddings"]:
        model.lm_head.weight = model.transformer.wte.weight
    run: Any = torch.compile(model)
    before = process.peak_bytes()
    # Norms too are decayed, as litgpt does it: in this race only the time of it counts, and the first loss.
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    narrow = torch.cpu._is_avx512_bf16_supported()
    seconds, losses = [], []
    for step in tokens:
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            logits = run(step[:, :-1].contiguous())
            loss = chunked_cross_entropy(logits, step[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    peak = process.peak_bytes()
    print(json.dumps({"value": rows * length / median(seconds[1:]), "unit": "tokens/s",
                      "version": version("litgpt"), "first_step_seconds": seconds[0], "losses": losses,
                      "peak_bytes": peak, "peak_of_training": peak - before}))  # fmt: skip


main()
