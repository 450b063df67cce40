"""What the model thought of every answer before it learned: computed once, and kept beside the run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from camelid.finetune.pack import PackedExamples
from camelid.finetune.preference import FACTS, GOOD, REFERENCE, answer_log_probs
from camelid.formats.safetensors_file import write_safetensors
from camelid.model.llama import Llama
from camelid.report.progress import progress
from camelid.train.parallel import Ranks, anywhere, release


def reference_facts(
    model: Llama | None, known: str, source: PackedExamples, good: Sequence[bool], run: Path | None,
    who: Ranks | None = None, quiet: bool = True,
) -> Tensor:  # fmt: skip
    """The facts of every unit that fits, float64 [units, 2, FACTS]; without a model, no reference is needed.

    `known` tells the model from others, `good` are the verdicts of all units, as they were given to `source`; `run` is
    where the log-probabilities are kept. All ranks compute them together, or read what is there.
    """
    facts = torch.zeros(len(source.units), 2, FACTS, dtype=torch.float64)
    facts[:, :, GOOD] = torch.tensor([good[n] for n in source.kept], dtype=torch.float64)[:, None]
    if model is not None:
        facts[:, :, REFERENCE] = _kept(
            model, _key(f"{known} {model.dtype}", source), source, run, who or Ranks(), quiet
        )
    return facts


def _kept(model: Llama, key: str, source: PackedExamples, run: Path | None, who: Ranks, quiet: bool) -> Tensor:
    """From the run's folder when it was computed for this very model and these examples, else computed."""
    from safetensors.torch import load_file

    file = run / f"reference-{key[:24]}.safetensors" if run else None
    if file and anywhere(who, int(who.rank == 0 and file.is_file())):
        return load_file(file)[key]
    computed = _computed(model, source, quiet)
    release(model)
    if file and who.rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        making = file.with_suffix(".making")
        write_safetensors(making, {key: computed})
        making.replace(file)
    return computed


def _key(known: str, source: PackedExamples) -> str:
    digest = hashlib.sha256(f"{known} {source.sequence_length}".encode())
    for unit in source.units:
        for example in unit:
            digest.update(repr((example.ids, example.labels)).encode())
    return digest.hexdigest()


def _computed(model: Llama, source: PackedExamples, quiet: bool) -> Tensor:
    found = torch.zeros(len(source.units), 2, dtype=torch.float64)
    with torch.no_grad(), progress("reference", len(source), quiet) as advance:
        for row, units in enumerate(source.rows):
            sums, _ = answer_log_probs(model, source.batch_of([row]).to(model.device))
            found[units] = sums[0].double().cpu().view(-1, 2)
            advance(row + 1)
    return found
