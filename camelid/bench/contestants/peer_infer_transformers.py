"""transformers' side of the generation race, bfloat16: as its documentation shows it, and in the form `best` at its
best on a CPU (a static cache and a compiled forward pass)."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    import torch
    import transformers
    from infer_protocol import prompt_length, race, threads

    torch.set_num_threads(threads())
    chatter: Any = transformers.logging
    chatter.set_verbosity_error()
    best, started = os.environ["BENCH_FORM"] == "best", time.perf_counter()
    opener: Any = transformers.AutoModelForCausalLM
    model = opener.from_pretrained(Path(sys.argv[2]) / "model", dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    extra = {"cache_implementation": "static"} if best else {}
    if best:
        model.forward = torch.compile(model.forward)

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new: int) -> None:
        ids = torch.tensor(prompts)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **extra,
        )
        assert found.shape[1] == len(prompts[0]) + new

    if best:  # what is compiled is compiled before the race
        for rows, length, new in (
            (1, prompt_length(), 65),
            (1, prompt_length(), 1),
            (8, 64, 33),
            (8, 64, 1),
            (32, 64, 33),
            (32, 64, 1),
        ):
            generate([[5] * length] * rows, new)
    race(generate, model.config.vocab_size, transformers.__version__, time.perf_counter() - started)


main()
