"""An adapter into the weights of its full-precision base: a plain model that needs no adapter any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from camelid.errors import InputError
from camelid.formats.adapter import base_of, is_adapter
from camelid.formats.convert import write_model
from camelid.formats.load import load, load_tokenizer, open_model, resolve
from camelid.model.llama import Llama
from camelid.model.lora import merge

# Looked at before and after: letters, digits, code and Chinese.
SAMPLE = (
    "The quick brown fox counts 1, 2, 3 and 4. def f(x): return x + 1\n天地玄黄，宇宙洪荒。 Question: what is 12 * 7? "
    "Answer: 84, because ten times seven is seventy and two times seven is fourteen."
)


def merge_adapter(source: str | Path, out: str | Path) -> dict[str, Any]:
    """Write `out`, the base of an adapter (folder or run) with the adapter in its weights, in the base's own dtype.

    Returns out, dtype, digest, and largest_logit_change between the adapter on its base and the merged weights, over a
    fixed text. Raises InputError when the source is no adapter, or its base was quantised: weights rounded a second
    time around the adapter would no longer be what was trained.
    """
    path = resolve(source)
    if not path.is_dir() or not is_adapter(path):
        raise InputError(f"{path} is not an adapter (no adapter_config.json): there is nothing to merge")
    base = resolve(base_of(path))
    checkpoint = open_model(base)
    if checkpoint.quantized:
        raise InputError(
            f"{base} holds {checkpoint.quantized} weights: an adapter is merged into full precision only. Write the "
            "original model's folder into base_model_name_or_path of adapter_config.json, or accept the loss first: "
            f"camelid convert {base} --to hf --out FOLDER writes the rounded weights as full ones"
        )
    model: Llama = load(path)
    ids = torch.tensor([load_tokenizer(path).encode(SAMPLE)])
    with torch.inference_mode():
        before = model(ids).logits.float()
        merge(model, "default")
        after = model(ids).logits.float()
    change = float((before - after).abs().max())
    largest = float(before.abs().max())
    digest = write_model(
        model.config, dict(model.named_parameters()), path, out, [path, base], largest_logit_change=change
    )
    return {
        "out": str(out), "dtype": str(model.dtype).removeprefix("torch."), "largest_logit_change": change,
        "largest_logit": largest, "digest": digest,
    }  # fmt: skip
