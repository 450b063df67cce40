"""Open any MODEL: a Hugging Face folder, a run folder (its newest good checkpoint) or a `.gguf` file."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from camelid.artifact import MANIFEST
from camelid.errors import FormatError, InputError
from camelid.formats.checkpoint import Checkpoint
from camelid.model.llama import Llama
from camelid.tokenizer.load import from_folder, from_gguf, from_model_file
from camelid.tokenizer.tokenizer import Tokenizer

Model = TypeVar("Model", bound=Llama)


def resolve(source: str | Path) -> Path:
    """The HF folder or file that MODEL means. Raises InputError when there is none."""
    path = Path(source).expanduser()
    if not path.exists():
        hint = ""
        if str(source).count("/") == 1 and not path.parent.exists():
            hint = f" If it is a hub id, download it first: hf download {source} --local-dir {Path(str(source)).name}"
        raise InputError(f"no model at {source}: no such file or folder.{hint}")
    if path.is_file() or (path / "config.json").exists():
        return path
    if checkpoints := finished(path):
        return checkpoints[0]
    found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
    raise InputError(
        f"{path} is not a model: it holds neither config.json nor checkpoints/step-*/ with a manifest "
        f"(it holds {found})"
    )


def finished(run: Path) -> list[Path]:
    """The finished checkpoints of a run folder, newest first."""
    found = sorted(run.glob("checkpoints/step-*"), key=lambda p: p.name, reverse=True)
    return [p for p in found if (p / MANIFEST).exists()]


def open_model(source: str | Path) -> Checkpoint:
    """Open MODEL without reading its weights. Raises InputError or FormatError naming file and field."""
    path = resolve(source)
    if path.is_dir():
        from camelid.formats import hf

        return hf.open_folder(path)
    if path.suffix == ".gguf":
        from camelid.formats import gguf

        return gguf.open_file(path)
    raise InputError(f"{path}: expected a folder with config.json, or a .gguf file")


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    model_class: type[Model] = Llama,  # type: ignore[assignment]
) -> Model:
    """Read MODEL into a Llama in evaluation mode. dtype None keeps the file's own.

    Every tensor of the model must be in the file with the right shape, and none may be left over: a model is
    never opened with weights missing. Raises FormatError naming the tensor.
    """
    checkpoint = open_model(source)
    with torch.device("meta"):
        model = model_class(checkpoint.config)
    missing = set(model.state_dict())
    tied = checkpoint.config.tie_word_embeddings
    for name, tensor in checkpoint.tensors():
        if name == "lm_head.weight" and tied:
            continue
        _assign(model, name, tensor.to(device=device, dtype=dtype or tensor.dtype), checkpoint)
        missing.discard(name)
    if tied:
        missing.discard("lm_head.weight")
    if missing:
        raise FormatError(f"{checkpoint.path}: tensor {min(missing)!r} is missing ({len(missing)} in all)")
    model.tie()
    if dtype is None:  # files may mix dtypes (norms in float32); computing needs one
        model.to(model.embed_tokens.weight.dtype)
    return model.eval()


def _assign(model: Llama, name: str, tensor: torch.Tensor, checkpoint: Checkpoint) -> None:
    owner_name, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(owner_name)
        expected = tuple(getattr(owner, leaf).shape)
    except AttributeError:
        raise FormatError(
            f"{checkpoint.path}: tensor {name!r} does not belong to the LLaMA that its config describes"
        ) from None
    if tuple(tensor.shape) != expected:
        raise FormatError(
            f"{checkpoint.path}: tensor {name!r} has shape {list(tensor.shape)}, the config says {list(expected)}"
        )
    setattr(owner, leaf, torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of MODEL, of a tokenizer folder, or a `tokenizer.model` file."""
    path = Path(source).expanduser()
    if path.is_dir() and ((path / "tokenizer.json").exists() or (path / "tokenizer.model").exists()):
        return from_folder(path)
    if path.is_file() and path.suffix == ".model":
        return from_model_file(path)
    path = resolve(source)
    if path.suffix == ".gguf":
        from camelid.formats import gguf

        return from_gguf(path, gguf.parse(path).metadata)
    return from_folder(path)


def stop_ids(source: str | Path) -> tuple[int, ...]:
    """Every id that ends a text: `generation_config.json` first, then the config."""
    checkpoint = open_model(source)
    eos = checkpoint.generation.get("eos_token_id")
    if eos is None:
        return checkpoint.config.stop_ids
    return (eos,) if isinstance(eos, int) else tuple(eos)
