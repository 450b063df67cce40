"""A training step beside those of transformers and, on a CPU, of litgpt: from the same weights, on the same tokens,
with the same AdamW; and each of our techniques switched off. Of all weights (`full`), or of a LoRA adapter on all
linear layers beside PEFT's (`lora`), with the loss on answers: 58 % of the tokens, as in GSM8K under SmolLM2's chat
template; ours also over a base in int8, whose products with states and slopes rounded to bytes are not PEFT's. Nobody
pads.

A peer runs twice: as its documentation shows it, and at its best (compiled, memory kept). All compute in bfloat16 where
the processor has it, else in float32. No speed is given when the losses disagree. Where there is a GPU, all use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from camelid.bench.race import TRANSFORMERS, Contestant, agree, race, ratios

# Name: size, rows, sequence length.
CONFIGS = {"S": ("15m", 16, 256), "M": ("110m", 4, 512), "L": ("llama-3.2-1b", 8, 2048)}
PEFT = ("peft==0.21.2", *TRANSFORMERS)
LITGPT = ("litgpt==0.5.13", "torch==2.13.0", "numpy")
TECHNIQUES = ("native", "memory", "chunks")
IN_BYTES = "camelid, base in int8"
ON_GPU = ("compile", "chunks")
AGREE = 1e-2  # of the first losses, bfloat16; float32 is two hundred times closer


def contestants(config: str, threads: Sequence[int], ablate: bool, task: str = "full") -> list[Contestant]:
    """Ours and each peer twice, on each number of threads; with `ablate` also ours without each technique."""
    found = []
    told = (("TASK", task),)
    peers: list[tuple[str, str, tuple[str, ...]]] = [("transformers", "peer_train.py", TRANSFORMERS)]
    if task == "lora":
        peers = [("peft", "peer_train.py", PEFT)]
    elif config in ("S", "M") and not on_gpu():
        peers.append(("litgpt", "peer_train_litgpt.py", LITGPT))
    for count in threads:
        found.append(Contestant("camelid", "own_train.py", config, (), count, told))
        if task == "lora" and not on_gpu():
            base = (*told, ("BASE", "int8"))
            found.append(Contestant(IN_BYTES, "own_train.py", config, (), count, base))
        for peer, script, packages in peers:
            found.append(Contestant(peer, script, config, packages, count, told))
            best = (*told, ("BEST", "1"))
            found.append(Contestant(f"{peer} at its best", script, config, packages, count, best))
    if ablate:
        for technique in ON_GPU if on_gpu() else TECHNIQUES:
            off = (*told, ("WITHOUT", technique))
            found.append(Contestant(f"camelid without {technique}", "own_train.py", config, (), threads[0], off))
    return found


def on_gpu() -> bool:
    """Whether the race is run on a GPU: the contestants use one where there is one."""
    import torch

    return torch.cuda.is_available()


def run(
    configs: Sequence[str], rounds: int, threads: Sequence[int] = (1, 2), steps: int = 4, ablate: bool = False,
    quiet: bool = False, task: str = "full",
) -> dict[str, Any]:  # fmt: skip
    """Rows, ratios of speed and memory, and the limit that utilisation is measured against."""
    rows: list[dict[str, Any]] = []
    for config in configs:
        with TemporaryDirectory() as scratch:
            prepare(Path(scratch), config, steps)
            found = race(contestants(config, threads, ablate, task), Path(scratch), rounds, quiet)
        agree(found, lambda row: float(row["losses"][0]), AGREE, "the losses of the first step")
        rows += found
    told: dict[str, float] = {}
    for ours in ("camelid", IN_BYTES):
        speeds, memory = ratios(rows, ours), ratios(rows, ours, key="peak_bytes")
        both = speeds | {name.replace(ours, f"memory of {ours}", 1): value for name, value in memory.items()}
        told |= {name: value for name, value in both.items() if not name.endswith("/ camelid")}
    return {"rows": rows, "ratios": told, "limits": limits(rows, threads) if task == "full" else {}}


def prepare(folder: Path, config: str, steps: int) -> None:
    """Random weights (seed 0) and random tokens, int64 [steps, rows, length + 1]."""
    import numpy as np
    import torch

    from camelid.formats.hf import save
    from camelid.model.config import LlamaConfig
    from camelid.model.llama import Llama

    size, rows, length = CONFIGS[config]
    torch.manual_seed(0)
    model = Llama(LlamaConfig.named(size))
    save(model, folder / "model")
    shape = (steps, rows, length + 1)
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, model.config.vocab_size, shape))


def limits(rows: Sequence[dict[str, Any]], threads: Sequence[int]) -> dict[str, Any]:
    """What the machine's matrix product reaches, and which share of it each of our rows uses."""
    import torch

    from camelid.model.config import LlamaConfig
    from camelid.train.log import flops_per_token, peak_flops

    found: dict[str, Any] = {}
    before = torch.get_num_threads()
    for count in threads:
        torch.set_num_threads(count)
        peak, named = peak_flops(torch.device("cuda" if on_gpu() else "cpu"))
        for row in rows:
            if row["implementation"] == "camelid" and row["threads"] == count and "value" in row:
                size, _, length = CONFIGS[row["task"]]
                used = row["value"] * flops_per_token(LlamaConfig.named(size), length) / peak
                found[f"{row['task']}, {count} threads"] = f"{used:.0%} of {named}"
    torch.set_num_threads(before)
    return found
