"""camelid's side of the generation race: own_infer.py KIND FOLDER. BENCH_FORM says in which bits the weights are,
BENCH_CACHE whether keys and values are in int8."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Literal

import torch
from infer_protocol import prompt_length, race, threads

from camelid import __version__
from camelid.formats.load import load
from camelid.generate.engine import Engine
from camelid.generate.native import NativeRunner
from camelid.generate.place import runner_for
from camelid.generate.sampling import SamplingParams
from camelid.kernels.decoder import PAGE
from camelid.model.llama import Llama
from camelid.model.quantized import BITS


def main() -> None:
    kind, started = os.environ["BENCH_FORM"], time.perf_counter()
    torch.set_num_threads(threads())
    model: Llama = load(Path(sys.argv[2]) / "model", dtype=torch.bfloat16, bits=BITS.get(kind), head=True)
    cache: Literal["int8"] | None = "int8" if os.environ.get("BENCH_CACHE") == "int8" else None
    runner = runner_for(model, None, threads(), cache, keep=False)
    del model
    # Room for what is generated at once: what memory is held can then be told from what is asked for.
    engine = Engine(runner, None, stop_ids=(), cache_tokens=max(4096, 2 * (prompt_length() + 65)))
    loaded = time.perf_counter() - started

    def generate(prompts: list[list[int]], new: int) -> None:
        found = engine.generate(prompts, SamplingParams(max_new_tokens=new, ignore_eos=True))
        assert all(len(result.ids) == new for result in found)

    weights = runner.weight_bytes if isinstance(runner, NativeRunner) else 0
    embedding = engine.config.vocab_size * engine.config.hidden_size * 2
    held = weights + embedding + runner.page_bytes() * engine.scheduler.pages.count
    length = prompt_length() + (1 + 64) / 2  # of the text while it is gone on with, on average
    version = f"{__version__} {type(runner).__name__}"
    race(
        generate, engine.config.vocab_size, version, loaded,
        weight_bytes=weights, cache_bytes=runner.page_bytes() / PAGE * length, held_bytes=held,
    )  # fmt: skip


main()
