"""A checkpoint: a Hugging Face folder with its tokenizer, and beside it `state/` to go on exactly where it stopped.

Optimizer moments and the random generator are safetensors, the loop's state is JSON; no pickle. All tensors are whole,
whatever the number of ranks. A save copies the tensors, and a thread writes the copy while training goes on. A folder
appears complete or not at all, is read back before an older one is removed, and is checked byte for byte before a run
goes on from it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from camelid.artifact import MANIFEST, damage, new_folder, read_manifest, write_manifest
from camelid.errors import CamelidError, FormatError, InputError
from camelid.formats.adapter import ADAPTER, read_adapter, write_adapter
from camelid.formats.checkpoint import Stored, dense
from camelid.formats.hf import WEIGHTS, open_folder, write_weights
from camelid.formats.load import STEP, finished
from camelid.formats.safetensors_file import write_safetensors
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.lora import LoraConfig
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.train.optimizer import AdamW, learned
from camelid.train.parallel import full, spread

MOMENTS, RANDOM, LOOP = "state/optimizer.safetensors", "state/random.safetensors", "state/loop.json"


@dataclass
class LoopState:
    """Everything the loop needs besides weights and moments.

    `position` counts sequences taken from the data, `tokens` supervised tokens, `chain` is a hash over every row ever
    trained on, `recent` the losses that the guard compares with, `skipped` and `rollbacks` what it did.
    """

    step: int = 0
    position: int = 0
    tokens: int = 0
    steps: int = 0
    chain: str = ""
    recent: list[float] = field(default_factory=list)
    skipped: int = 0
    in_a_row: int = 0
    rollbacks: int = 0


@dataclass(frozen=True)
class Snapshot:
    """Copies of a moment of training, whole tensors by name; empty on all ranks but the first."""

    config: LlamaConfig
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    random: Tensor
    state: LoopState
    adapter: LoraConfig | None = None


def snapshot(model: Llama, optimizer: AdamW, state: LoopState, keep: bool, copy: bool) -> Snapshot:
    """All ranks gather each tensor; only with `keep` is it kept. `copy` makes it independent of what training does
    next."""

    def taken(tensor: Tensor) -> Tensor | None:
        whole = full(tensor)
        if not keep:
            return None
        return whole.cpu() if whole.device.type != "cpu" else whole.clone() if copy else whole

    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    weights = {name: taken(parameter) for name, parameter in learned(model).items()}
    moments = {
        f"{names[parameter]}/{key}": taken(value)
        for parameter, values in _in_order(optimizer, names)
        for key, value in values.items()
    }
    kept = {n: t for n, t in weights.items() if t is not None}, {n: t for n, t in moments.items() if t is not None}
    state = LoopState(**json.loads(json.dumps(asdict(state))))
    return Snapshot(model.config, *kept, torch.get_rng_state(), state, next(iter(model.adapters.values()), None))


def _in_order(optimizer: AdamW, names: Mapping[Tensor, str]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The optimizer's state by parameter name: the same order on every rank, as collectives need."""
    return sorted(optimizer.state.items(), key=lambda item: names[item[0]])


def write(
    out: Path, taken: Snapshot, tokenizer: Tokenizer, inputs: Sequence[Mapping[str, Any]], settings: dict[str, Any],
    generation: dict[str, Any], facts: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write the checkpoint folder `out`, and read it back; `inputs` as `artifact.described` tells them, a base first.
    Raises CamelidError when it is not what was written."""
    with new_folder(out, "checkpoint") as folder:
        if taken.adapter:
            known = write_adapter(taken.adapter, taken.weights, folder, Path(inputs[0]["path"]), generation)
        else:
            known = write_weights(taken.config, taken.weights, folder, generation)
        tokenizer.save(folder)
        (folder / "state").mkdir()
        known[MOMENTS] = write_safetensors(folder / MOMENTS, taken.moments)
        known[RANDOM] = write_safetensors(folder / RANDOM, {"cpu": taken.random})
        (folder / LOOP).write_text(json.dumps(asdict(taken.state)) + "\n", encoding="utf-8")
        facts = {**(facts or {}), "state": asdict(taken.state), "parameters": taken.config.num_parameters()}
        write_manifest(folder, "checkpoint", inputs, settings, known, **facts)
    if wrong := damage(out):
        raise CamelidError(f"the checkpoint just written does not read back: {wrong}. Is the disk failing?")


class Saver:
    """Writes snapshots into a run folder, one at a time, in a thread; keeps the newest `keep`."""

    def __init__(self, run: Path, keep: int) -> None:
        self.run, self.keep = run, keep
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def save(self, taken: Snapshot, background: bool, **parts: Any) -> None:
        """Begin to write a checkpoint (arguments as in `write`); the one before is finished first."""
        self.wait()

        def work() -> None:
            try:
                self._write(taken, parts)
            except BaseException as error:
                self._error = error

        self._thread = Thread(target=copy_context().run, args=(work,), name="checkpoint")
        self._thread.start()
        if not background:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises what went wrong."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _write(self, taken: Snapshot, parts: dict[str, Any]) -> None:
        out = folder_of(self.run, taken.state.step)
        try:
            try:
                write(out, taken, **parts)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                sweep(self.run)  # what is left of unfinished writes may make room
                write(out, taken, **parts)
        except OSError as error:
            newest = next(iter(finished(self.run)), None)
            raise CamelidError(
                f"{out} could not be written: {error.strerror or error}. "
                f"{f'The last finished checkpoint, {newest.name}, is intact' if newest else 'No checkpoint exists yet'}"
                "; make room or mend the disk, then go on with --resume"
            ) from None
        # Newer folders than this one are damaged, or the run would not have begun before them: they do not count.
        for old in [p for p in finished(self.run) if p.name <= out.name][self.keep :]:
            try:
                remove(old)
            except OSError as error:  # the run is not at risk; the next start sweeps
                print(f"camelid: {old} could not be removed: {error.strerror}", file=sys.stderr)


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08}"


def newest_good(run: Path) -> Path | None:
    """The newest checkpoint that is whole, byte for byte. Says on stderr why it passes over a newer one."""
    for folder in finished(run):
        wrong = damage(folder)
        if wrong is None:
            return folder
        print(f"camelid: {folder.name} is passed over: {wrong}", file=sys.stderr)
    return None


def remove(folder: Path) -> None:
    """Remove a checkpoint; its manifest goes first, so half of one never counts as finished."""
    os.unlink(folder / MANIFEST)
    shutil.rmtree(folder)


def sweep(run: Path) -> None:
    """Remove what interrupted writes and removals left behind, and nothing that others keep there."""
    for path in (run / "checkpoints").glob("*"):
        halfway = re.fullmatch(r"\.step-\d+\..+", path.name)
        if path.is_dir() and (halfway or (re.fullmatch(STEP, path.name) and not (path / MANIFEST).exists())):
            shutil.rmtree(path, ignore_errors=True)


def preflight(run: Path, needed: int, keep: int) -> None:
    """Raises InputError when the disk has no room for `keep` checkpoints of `needed` bytes and one being written."""
    place = run
    while not place.exists():
        place = place.parent
    already = sum(p.stat().st_size for p in run.glob("checkpoints/*/**/*") if p.is_file())
    free, wanted = shutil.disk_usage(place).free + already, needed * (keep + 1)
    if free < wanted:
        raise InputError(
            f"log.out {run}: {keep + 1} checkpoint(s) of {needed / 2**20:,.0f} MiB do not fit into the "
            f"{free / 2**20:,.0f} MiB that are free: make room, choose another log.out, or lower checkpoint.keep"
        )


def restore(folder: Path, model: Llama, optimizer: AdamW) -> LoopState:
    """Put weights, moments and the generator back. Raises FormatError when the state belongs to another model."""
    from safetensors.torch import load_file

    parameters = learned(model)
    kept: Mapping[str, Tensor | Stored] = read_adapter(folder)[1] if model.adapters else open_folder(folder).tensors()
    with torch.no_grad():
        for name, tensor in kept.items():
            if name not in parameters or tuple(parameters[name].shape) != tuple(tensor.shape):
                raise FormatError(
                    f"{folder}: tensor {name!r} does not fit the recipe's model: resume with its own recipe"
                )
            parameters[name].copy_(spread(dense(tensor).to(parameters[name].dtype), parameters[name]))
    optimizer.state.clear()
    for name, value in load_file(folder / MOMENTS).items():
        parameter = parameters[name.rpartition("/")[0]]
        # A copy, for the file may be pruned; a counter of steps belongs on the weight's device too.
        like = spread(value, parameter) if value.shape == parameter.shape else value.to(parameter.device)
        like = like.clone()
        optimizer.state[parameter][name.rpartition("/")[2]] = like
    torch.set_rng_state(load_file(folder / RANDOM)["cpu"])
    return LoopState(**json.loads((folder / LOOP).read_text(encoding="utf-8")))


def weights_digest(folder: Path) -> str:
    """SHA-256 of the (single) weights file, from the manifest."""
    files: dict[str, str] = read_manifest(folder)["files"]
    return files.get(WEIGHTS) or files.get(ADAPTER) or files[f"{WEIGHTS}.index.json"]
