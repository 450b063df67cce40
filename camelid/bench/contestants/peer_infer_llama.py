"""llama.cpp's side of the generation race, through llama-cpp-python's own functions. BENCH_FORM is F16, BF16, Q8_0,
Q4_0 or Q4_K_M; its own tool makes the quantised files of the F16 one."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}  # enum llama_ftype


def quantized(folder: Path, kind: str) -> Path:
    """The file of a type, made when it is first asked for."""
    import llama_cpp

    whole, wanted = folder / "F16.gguf", folder / f"{kind}.gguf"
    if not wanted.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = TYPES[kind], 2
        part = folder / f"{kind}.part"
        failed = llama_cpp.llama_model_quantize(str(whole).encode(), str(part).encode(), params)
        if failed:
            raise SystemExit(f"llama.cpp could not quantise to {kind}")
        os.replace(part, wanted)
    return wanted


def main() -> None:
    import llama_cpp
    from infer_protocol import prompt_length, race, threads

    kept = os.dup(2)  # what it says while loading is not an error
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    path = quantized(Path(sys.argv[2]), os.environ["BENCH_FORM"])
    started = time.perf_counter()
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_batch, params.n_ubatch = 2048, 512
    params.n_threads = params.n_threads_batch = threads()
    params.kv_unified = False  # as its header advises for texts that share no beginning
    contexts: dict[int, Any] = {}

    def context_for(rows: int) -> Any:
        if rows not in contexts:
            params.n_seq_max = rows
            params.n_ctx = max(4096, prompt_length() + 128) if rows == 1 else 256 * rows
            contexts[rows] = llama_cpp.llama_init_from_model(model, params)
        return contexts[rows]

    context_for(1)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    loaded = time.perf_counter() - started
    os.dup2(kept, 2)
    batch: Any = llama_cpp.llama_batch_init(4096, 0, 1)
    import numpy as np

    def put(context: Any, entries: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(entries)
        for n, (token, position, row, wanted) in enumerate(entries):
            batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = token, position, 1, row
            batch.logits[n] = wanted
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")

    def likeliest(context: Any, place: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, place)
        return int(np.ctypeslib.as_array(logits, (vocab,)).argmax())

    def generate(prompts: list[list[int]], new: int) -> None:
        context = context_for(len(prompts))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        entries = [(token, at, row, at == len(p) - 1) for row, p in enumerate(prompts) for at, token in enumerate(p)]
        for start in range(0, len(entries), 2048):
            part = entries[start : start + 2048]
            put(context, part)
        ends = [n for n, entry in enumerate(part) if entry[3]]
        tokens = [likeliest(context, n) for n in ends] if len(ends) == len(prompts) else [5] * len(prompts)
        for step in range(new - 1):
            put(context, [(token, len(prompts[0]) + step, row, True) for row, token in enumerate(tokens)])
            tokens = [likeliest(context, row) for row in range(len(prompts))]

    race(generate, vocab, f"{llama_cpp.__version__} {os.environ['BENCH_FORM']}", loaded)


main()
