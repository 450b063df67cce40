"""A checkpoint: a Hugging Face folder with its tokenizer, and beside it `state/` to go on exactly where it stopped.

Optimizer moments are safetensors, the loop's state is JSON; no pickle. The folder appears complete or not at all.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camelid.artifact import MANIFEST, new_folder, read_manifest, write_manifest
from camelid.errors import FormatError
from camelid.formats.hf import WEIGHTS, write_weights
from camelid.model.llama import Llama
from camelid.tokenizer.tokenizer import Tokenizer


@dataclass
class LoopState:
    """Everything the loop needs besides weights and moments. `position` counts sequences taken from the data."""

    step: int = 0
    position: int = 0
    tokens: int = 0
    steps: int = 0


def write(
    out: Path,
    model: Llama,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    state: LoopState,
    *,
    inputs: list[Path],
    settings: dict[str, Any],
    generation: dict[str, Any],
) -> dict[str, Any]:
    """Write the checkpoint folder `out`; returns its manifest."""
    from safetensors.torch import save_file

    with new_folder(out) as folder:
        write_weights(model, folder, generation)
        tokenizer.save(folder)
        (folder / "state").mkdir()
        save_file(_moments(model, optimizer), folder / "state" / "optimizer.safetensors")
        (folder / "state" / "loop.json").write_text(json.dumps(asdict(state)) + "\n")
        return write_manifest(folder, "checkpoint", inputs, settings, state=asdict(state),
                              parameters=model.num_parameters())  # fmt: skip


def _moments(model: Llama, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value.detach().cpu().contiguous()
        for parameter, moments in optimizer.state.items()
        for key, value in moments.items()
    }


def newest(run: Path) -> Path | None:
    """The last finished checkpoint of a run folder."""
    found = sorted(p for p in run.glob("checkpoints/step-*") if (p / MANIFEST).exists())
    return found[-1] if found else None


def restore(folder: Path, model: Llama, optimizer: torch.optim.Optimizer) -> LoopState:
    """Put weights and moments back. Raises FormatError when the state belongs to another model."""
    from safetensors.torch import load_file

    from camelid.formats.hf import open_folder

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in open_folder(folder).tensors():
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise FormatError(
                    f"{folder}: tensor {name!r} does not fit the recipe's model: resume with its own recipe"
                )
            parameters[name].copy_(tensor)
    moments: dict[Tensor, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "state" / "optimizer.safetensors").items():
        parameter_name, _, key = name.rpartition("/")
        moments.setdefault(parameters[parameter_name], {})[key] = value
    optimizer.state.update(moments)
    return LoopState(**json.loads((folder / "state" / "loop.json").read_text()))


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in sorted(run.glob("checkpoints/step-*"))[:-keep]:
        shutil.rmtree(old)


def weights_digest(folder: Path) -> str:
    """SHA-256 of the (single) weights file, from the manifest."""
    files: dict[str, str] = read_manifest(folder)["files"]
    return files.get(WEIGHTS) or files[f"{WEIGHTS}.index.json"]
