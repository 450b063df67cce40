"""litgpt's side of the training race: peer_train_litgpt.py {S,M} FOLDER. Its model and its loss as its
`pretrain` has them: compiled, the loss eager in chunks, weights float32 under bfloat16; the optimizer fused, which it
is on a GPU only. With BENCH_BEST its memory is kept."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import process


def main() -> None:
    if os.environ.get("BENCH_BEST"):
        process.keep_memory()
    import torch
    import train_protocol
    from litgpt import GPT, Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    folder = Path(sys.argv[2])
    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    shape = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    tokens = train_protocol.tokens_of(folder)
    config = Config(
        block_size=tokens.shape[2] - 1, n_layer=shape["num_hidden_layers"], n_head=shape["num_attention_heads"],
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
    before = train_protocol.peak_bytes("cpu")

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = chunked_cross_entropy(run(rows[:, :-1].contiguous()), rows[:, 1:].contiguous())
        return loss

    # Norms too are decayed, as litgpt does it: in this race only the time of it counts, and the first loss.
    narrow = torch.cpu._is_avx512_bf16_supported()
    take = train_protocol.torch_step(loss_of, model.parameters(), "cpu", narrow)
    train_protocol.race(tokens, take, version("litgpt"), "cpu", before)


main()
