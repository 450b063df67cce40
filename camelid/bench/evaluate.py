"""Measuring a model beside the tools that people measure with: perplexity beside transformers, multiple choice beside
lm-eval's own class for Hugging Face models. The same weights, dtype, windows and questions for all; no speed is given
when their sums of log-likelihoods disagree.

Each peer runs twice: as its documentation shows it, and at its best (compiled with memory kept; in batches).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from camelid.bench.race import TRANSFORMERS, Contestant, agree, race, ratios
from camelid.errors import InputError

HARNESS = ("lm-eval==0.4.13", "accelerate", *TRANSFORMERS)
AGREE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative, of the sums of all log-likelihoods


def run(
    model: str, data: str | None, questions: str | None, task: str = "arc", limit: int = 100, tokens: int = 32768,
    window: int = 2048, rounds: int = 3, threads: Sequence[int] = (1, 2), dtype: str = "auto", quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Race on the first `tokens` tokens (whole windows) of the text `data`, on the first `limit` of `questions`, or on
    both. Returns rows and ratios. Raises InputError when neither is given, or the text does not fill a window."""
    if not data and not questions:
        raise InputError("there is nothing to race on: give --data, a text, or --questions, a .jsonl file, or both")
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dtype = _prepare(folder, model, data, questions, task, limit, tokens, window, dtype)
        told = (("DTYPE", dtype), ("WINDOW", str(window)))
        for name, peer, packages in (("perplexity", "transformers", TRANSFORMERS), ("choice", "lm-eval", HARNESS)):
            if not (data if name == "perplexity" else questions):
                continue
            best = (*told, ("BEST", "1"))
            runs = [
                Contestant(who, script, name, needs, count, settings)
                for count in threads
                for who, script, needs, settings in (
                    ("camelid", "own_evaluate.py", (), told),
                    (peer, "peer_evaluate.py", packages, told),
                    (f"{peer} at its best", "peer_evaluate.py", packages, best),
                )
            ]
            found = race(runs, folder, rounds, quiet)
            largest = max((row["nats"] for row in found if "nats" in row), default=0.0)
            agree(found, lambda row: float(row["nats"]), AGREE[dtype] * largest, "the log-likelihoods")
            rows += found
    return {"rows": rows, "ratios": ratios(rows), "limits": {"dtype": dtype}}


def _prepare(
    folder: Path, model: str, data: str | None, questions: str | None, task: str, limit: int, tokens: int, window: int,
    dtype: str,
) -> str:  # fmt: skip
    """The model as a Hugging Face folder, token ids and questions; returns the dtype that `auto` means here."""
    import numpy as np
    import torch

    from camelid.evaluate.choice import questions as read_questions
    from camelid.evaluate.choice import read_task
    from camelid.evaluate.texts import read_texts
    from camelid.formats.hf import save
    from camelid.formats.load import load, load_tokenizer
    from camelid.model.llama import Llama
    from camelid.model.quantized import make_dense

    tokenizer = load_tokenizer(model)
    full: Llama = load(model, dtype=torch.float32)
    make_dense(full)  # peers open no rounded folder
    save(full, folder / "model")
    tokenizer.save(folder / "model")
    if data:
        ids = [i for text in read_texts(Path(data), tokenizer) for i in text.ids][: tokens + 1]
        whole = (len(ids) - 1) // window * window  # a short window at the end would be compiled for, inside the race
        if whole < window:
            raise InputError(f"--data: {len(ids)} tokens of {data} do not fill a window of {window}: lower --window")
        np.save(folder / "tokens.npy", np.array(ids[: whole + 1]))
    if questions:
        asked = read_questions(Path(questions), read_task(task))[:limit]
        (folder / "questions.json").write_text(json.dumps([[q.prompt, q.answers] for q in asked]), encoding="utf-8")
    if dtype == "auto":
        return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
    return dtype
