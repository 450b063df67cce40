"""Checks that take minutes: a long text, rounded forms; and the logits of transformers."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from camelid.formats.hf import save
from camelid.generate.engine import Engine
from camelid.generate.place import runner_for
from camelid.generate.runner import Chunk
from camelid.generate.sampling import SamplingParams
from camelid.kernels.decoder import PAGE
from camelid.verify.behaviour import _ids, _near
from camelid.verify.checklist import Check, Failed, NotApplicable, Subject

LONG = 512
KL = {"int8": 0.05, "int4": 1.0}  # nats a token: a model of 135 M parameters gives 0.007 and 0.53


@torch.inference_mode()
def long_text(subject: Subject) -> str:
    """Hundreds of greedy tokens: each is still the likeliest when the whole text is read at once."""
    model = subject.weights
    prompt = _ids(subject)[0, :32].tolist()
    most = min(LONG, model.config.max_position_embeddings - len(prompt) - 1)
    if most < 64:
        raise NotApplicable("the context is too short")
    [result] = Engine(model).generate([prompt], SamplingParams(max_new_tokens=most, ignore_eos=True))
    logits = model(torch.tensor([prompt + result.ids])).logits[0, len(prompt) - 1 : -1]
    for number, (row, token) in enumerate(zip(logits, result.ids, strict=True)):
        if float(row.max() - row[token]) > 1e-3 * float(row.abs().max()):
            raise Failed(f"token {number} of a greedy text is not the likeliest one when the text is read at once")
    return f"{most} greedy tokens are the likeliest ones of the whole text too"


@torch.inference_mode()
def rounded(form: str | None, kv_cache: Literal["int8"] | None, subject: Subject) -> str:
    """The scores of the model with rounded weights, or keys and values, against the full one's."""
    if form and subject.checkpoint.quantized:
        raise NotApplicable("the model is rounded already")
    ids = _ids(subject)[0].tolist()
    full = subject.weights(torch.tensor([ids])).logits[0].log_softmax(-1)
    # A copy: where the torch model runs, it is rounded in place.
    runner = Engine(runner_for(copy.deepcopy(subject.weights), form, None, kv_cache), cache_tokens=len(ids)).runner
    [found] = runner.run([Chunk(ids, 0, list(range(-(-len(ids) // PAGE))), len(ids))])
    less = found.log_softmax(-1)
    kl = float((full.exp() * (full - less)).sum(-1).mean())
    agree = float((full.argmax(-1) == less.argmax(-1)).float().mean())
    most = KL[form or "int8"]
    if not kl <= most:
        what = form or "an int8 cache"
        raise Failed(f"KL {kl:.3f} nats a token to the full model, at most {most} is usual: {what} breaks it")
    return f"KL {kl:.4f} nats a token, {agree:.0%} of the likeliest tokens are the same"


def against_transformers(python: str, subject: Subject) -> str:
    """The same logits from Hugging Face's own code, in a process of its own."""
    ids = _ids(subject)
    script = Path(__file__).parent / "peer_transformers.py"
    with tempfile.TemporaryDirectory() as place:
        folder = subject.path
        if not folder.is_dir() or not (folder / "config.json").exists() or subject.checkpoint.quantized:
            folder = Path(place) / "copy"
            save(subject.weights, folder)
        out = Path(place) / "logits.npy"
        asked = json.dumps({"folder": str(folder), "ids": ids.tolist(), "out": str(out)})
        done = subprocess.run([python, str(script)], input=asked, capture_output=True, text=True, check=False)
        if done.returncode == 3:
            raise NotApplicable("transformers is not installed here: pip install transformers")
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise Failed(f"transformers does not open it: {lines[-1] if lines else 'no reason given'}")
        theirs = torch.from_numpy(np.load(out))
    with torch.inference_mode():
        gap = _near(subject.weights(ids).logits[0], theirs, "camelid and transformers", 1e-4)
    return f"logits differ by at most {gap:.0e} of the largest (float32)"


CHECKS = [
    Check("long text", "drift over a long text", long_text),
    Check("int8", "weights that int8 breaks", partial(rounded, "int8", None)),
    Check("int4", "weights that int4 breaks", partial(rounded, "int4", None)),
    Check("int8 cache", "keys and values that int8 breaks", partial(rounded, None, "int8")),
]
TRANSFORMERS = Check("transformers", "any difference from the reference", partial(against_transformers, sys.executable))
