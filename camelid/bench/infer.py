"""Generating beside transformers, llama.cpp, CTranslate2 and OpenVINO, from the same weights: prefill, decoding alone
and in batches (`contestants/infer_protocol.py`). One process for each of them and number of threads, in turns.

The limits beside the figures: how fast this machine reads memory, which decoding cannot outrun by much (all weights are
read for each token; a cache may hold some), and how fast it multiplies, which prefill cannot.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from camelid.bench.race import TRANSFORMERS, Contestant, race, ratios

LLAMA = ("llama-cpp-python==0.3.36", "numpy")
CTRANSLATE2 = ("ctranslate2==4.8.5", *TRANSFORMERS)
OPENVINO = ("optimum-intel[openvino]", "torch==2.13.0")
OWN = "own_infer.py"
Settings = tuple[tuple[str, str], ...]
# Who is raced at which number of bits: name, script, packages, and which of its forms.
PEERS: dict[str, list[tuple[str, str, tuple[str, ...], str]]] = {
    "bf16": [
        ("transformers", "peer_infer_transformers.py", TRANSFORMERS, ""),
        ("transformers at its best", "peer_infer_transformers.py", TRANSFORMERS, "best"),
        ("llama.cpp F16", "peer_infer_llama.py", LLAMA, "F16"),
        ("llama.cpp BF16", "peer_infer_llama.py", LLAMA, "BF16"),
    ],
    "int8": [
        ("llama.cpp Q8_0", "peer_infer_llama.py", LLAMA, "Q8_0"),
        ("ctranslate2", "peer_infer_ctranslate2.py", CTRANSLATE2, "int8"),
        ("openvino", "peer_infer_openvino.py", OPENVINO, "8"),
    ],
    "int4": [
        ("llama.cpp Q4_0", "peer_infer_llama.py", LLAMA, "Q4_0"),
        ("llama.cpp Q4_K_M", "peer_infer_llama.py", LLAMA, "Q4_K_M"),
        ("openvino", "peer_infer_openvino.py", OPENVINO, "4"),
    ],
}


def run(
    model: str | None, kinds: Sequence[str] = tuple(PEERS), rounds: int = 3, threads: Sequence[int] = (1, 2),
    peers: bool = True, quiet: bool = False, context: int = 512, kv_cache: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Race on MODEL, or on random weights of TinyLlama's shape, one text being `context` tokens long before it is gone
    on with; with `kv_cache` camelid also runs with keys and values in int8. Returns rows, one a figure, ratios and
    limits."""
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as scratch:
        prepare(Path(scratch), model)
        contestants = [
            Contestant(name, script, kind, packages, count, settings)
            for kind in kinds
            for count in threads
            for name, script, packages, settings in _sides(kind, peers, context, kv_cache)
        ]
        found = race(contestants, Path(scratch), rounds, quiet)
    rows = [cell for row in found for cell in cells_of(row)]
    return {"rows": rows, "ratios": ratios(rows), "limits": limits(rows, threads)}


def _sides(kind: str, peers: bool, context: int, kv_cache: bool) -> list[tuple[str, str, tuple[str, ...], Settings]]:
    """Name, script, packages and settings of each that is raced."""
    length = ("CONTEXT", str(context))
    own: list[tuple[str, str, tuple[str, ...], Settings]] = [("camelid", OWN, (), (("FORM", kind), length))]
    if kv_cache:
        own.append(("camelid, int8 cache", OWN, (), (("FORM", kind), ("CACHE", "int8"), length)))
    others = PEERS[kind] if peers else []
    return own + [(name, script, packages, (("FORM", form), length)) for name, script, packages, form in others]


def cells_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each figure of a contestant's row."""
    rest = {key: value for key, value in row.items() if key != "cells"}
    return [
        rest | {"task": f"{row['task']} {name}", "value": median(values), "rounds": values}
        for name, values in row.get("cells", {}).items()
    ] or [rest]


def prepare(folder: Path, source: str | None) -> None:
    """The model as a Hugging Face folder in bfloat16 and as GGUF files in F16 and BF16, each with its tokenizer."""
    import torch

    from camelid.formats import gguf_write
    from camelid.formats.hf import save
    from camelid.formats.load import load, load_tokenizer
    from camelid.model.config import LlamaConfig
    from camelid.model.llama import Llama
    from camelid.model.quantized import make_dense
    from camelid.tokenizer.load import from_folder

    if source is None:
        torch.manual_seed(0)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model: Llama = Llama(LlamaConfig.named("tinyllama"))
        torch.set_default_dtype(usual)
        write_filler(folder / "tokenizer", model.config.vocab_size)
        tokenizer = from_folder(folder / "tokenizer")
    else:
        model, tokenizer = load(source, dtype=torch.bfloat16), load_tokenizer(source)
        make_dense(model)
    save(model, folder / "model")
    tokenizer.save(folder / "model")
    for kind in ("F16", "BF16"):
        gguf_write.write(model.config, dict(model.named_parameters()), tokenizer, folder / f"{kind}.gguf", kind)


def write_filler(folder: Path, size: int) -> None:
    """A byte-level tokenizer of `size` tokens, for peers that open no model without one: bytes, and pairs of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][: size - len(letters) - 3]
    words = ["<unk>", "<s>", "</s>", *letters, *(a + b for a, b in pairs)]
    made = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, pairs, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    known = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(known), encoding="utf-8")


def limits(rows: Sequence[dict[str, Any]], threads: Sequence[int]) -> dict[str, Any]:
    """How fast this machine reads memory and multiplies, and how much of the reading our decoding uses: of the weights,
    and with the keys and values that a token reads besides. And our peak memory until then, with what it is beside the
    weights, embedding and whole cache."""
    import torch

    from camelid.kernels.memory import large_pages

    found: dict[str, Any] = {}
    usual = torch.get_num_threads()
    for count in threads:
        torch.set_num_threads(count)
        block = large_pages(1 << 30).view(torch.float32).zero_()
        speed = block.nbytes / min(_seconds(block.sum) for _ in range(7)) / 1e9
        found[f"{count} threads, reading memory"] = f"{speed:.1f} GB/s"
        del block
        square = torch.zeros(2048, 2048, dtype=torch.bfloat16)
        flops = 2 * 2048**3 / min(_seconds(partial(torch.mm, square, square)) for _ in range(7)) / 1e9
        found[f"{count} threads, torch.mm bfloat16"] = f"{flops:.0f} GFLOP/s"
        for row in rows:
            if row.get("weight_bytes") and row["threads"] == count and "decode" in row["task"]:
                weights, both = (
                    row["value"] * size / 1e9 / speed
                    for size in (row["weight_bytes"], row["weight_bytes"] + row["cache_bytes"])
                )
                shares = f"{weights:.0%} of the memory's speed, with the cache {both:.0%}"
                name = f"{row['implementation']}, {count} threads"
                found[f"{row['task']}, {name}"] = shares
                peak, held = row["peak_bytes"] / 1e6, row["held_bytes"] / 1e6
                beside = f"{peak:,.0f} MB, {peak - held:,.0f} beside weights and cache"
                found[f"{row['task'].split()[0]}, {name}, peak memory"] = beside
    torch.set_num_threads(usual)
    return found


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
