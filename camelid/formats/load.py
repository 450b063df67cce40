"""Open any MODEL: a Hugging Face folder, one of Meta's, a run folder (its newest good checkpoint), a `.gguf` file or a
hub id."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from camelid.artifact import MANIFEST
from camelid.disk import read_json
from camelid.errors import CamelidError, FormatError, InputError
from camelid.formats import hf, meta
from camelid.formats.adapter import Fingerprint, attach, base_of, is_adapter
from camelid.formats.checkpoint import Checkpoint, check_kind, check_shape, drop_tied_head, strange
from camelid.formats.hub import is_hub_id, snapshot
from camelid.kernels.packed import BLOCK
from camelid.model.llama import Llama
from camelid.model.lora import use_adapter
from camelid.model.quantized import GROUP, Integers, QuantizedEmbedding, QuantizedLinear, round_to_nearest
from camelid.tokenizer.gguf_fields import from_gguf
from camelid.tokenizer.load import from_folder, from_model_file
from camelid.tokenizer.tokenizer import Tokenizer

Model = TypeVar("Model", bound=Llama)


STEP = r"step-\d{8,}"  # a checkpoint's folder: a copy by another name is its owner's business


def resolve(source: str | Path) -> Path:
    """The HF folder or file that MODEL means; a hub id is fetched. Raises InputError when there is none."""
    path = Path(source).expanduser()
    if not path.exists():
        if not is_hub_id(str(source)) or path.parent.exists():
            raise InputError(f"no model at {source}: no such file or folder")
        path = snapshot(str(source))
    if path.is_file() or (path / "config.json").exists() or is_adapter(path) or meta.is_meta(path):
        return path
    if checkpoints := finished(path):
        return checkpoints[0]
    found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
    raise InputError(
        f"{path} is not a model: it holds neither config.json, params.json nor checkpoints/step-*/ with a manifest "
        f"(it holds {found})"
    )


def located(source: str | Path) -> Path:
    """Where MODEL, or a tokenizer's folder or file, lies; a hub id is fetched. Raises InputError when there is none."""
    path = Path(source).expanduser()
    return path if path.exists() else resolve(source)


def finished(run: Path) -> list[Path]:
    """The finished checkpoints of a run folder, newest first."""
    found = [p for p in run.glob("checkpoints/step-*") if re.fullmatch(STEP, p.name) and (p / MANIFEST).exists()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def open_model(source: str | Path) -> Checkpoint:
    """Open MODEL without reading its weights; of an adapter, its base. Raises InputError or FormatError naming file
    and field."""
    path = resolve(source)
    if path.is_dir() and is_adapter(path):
        path = resolve(base_of(path))
    if path.is_dir():
        return meta.open_folder(path) if meta.is_meta(path) else hf.open_folder(path)
    if is_gguf(path):
        from camelid.formats import gguf

        return gguf.open_file(path)
    raise InputError(f"{path}: expected a folder with config.json or params.json, or a .gguf file")


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, by its name or, as of Ollama's files, which have none, by how it begins."""
    if path.is_dir():
        return False
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    model_class: type[Model] = Llama,  # type: ignore[assignment]
    bits: int | None = None,
    integers: bool = False,
    head: bool = False,
) -> Model:
    """Read MODEL into a Llama in evaluation mode. dtype None keeps the file's own. `bits`, `integers` and `head` as in
    `read_model`; an adapter's base is expanded, and its output projection is not rounded.

    Every tensor of the model must be in the file with the right shape, and none may be left over: a model is
    never opened with weights missing. An adapter is put on its base, which stays as it is. Raises FormatError naming
    the tensor.
    """
    path = resolve(source)
    adapter = path.is_dir() and is_adapter(path)
    kept, head = integers and not adapter, head and not adapter
    model, fingerprint = read_model(open_model(path), dtype, device, model_class, bits, kept, head)
    if adapter:
        attach(model, path, fingerprint=fingerprint)
    return model.eval()


def read_model(
    checkpoint: Checkpoint, dtype: torch.dtype | None, device: str | torch.device, model_class: type[Model],
    bits: int | None = None, integers: bool = False, head: bool = False,
) -> tuple[Model, str]:  # fmt: skip
    """All weights of an opened model, and their fingerprint. Quantised layers stay quantised, whatever the dtype.

    With `bits` the blocks' layers are rounded to so many, to nearest by groups of 32, each when it has been read: the
    model is never whole in memory; with `head` also an output projection that is not the embedding, to int8 as the
    engine runs it. Else, with `integers`, matrices that a GGUF file keeps in blocks are not expanded, the embedding and
    the output projection among them: see `Stored`. Raises InputError when a model is to be rounded that is already.
    """
    fingerprint = Fingerprint()
    with torch.device("meta"):
        model = model_class(checkpoint.config)
    missing = set(model.state_dict())
    tensors = checkpoint.tensors()
    drop_tied_head(checkpoint, tensors)
    for name, stored in tensors.items():
        outer = bits is None or (head and name == "lm_head.weight")
        inner = _matrix(model, name, outer) if integers or bits else None
        if inner is not None:
            check_shape(checkpoint.path, name, stored.shape, inner.weight.shape)
        kept = stored.integers if integers and inner is not None and bits is None else None
        tensor = kept() if kept else stored.read()
        if isinstance(tensor, Integers):
            if bits is not None:
                raise InputError(f"{checkpoint.path}: the model is quantised already; open it without quantization")
            fingerprint.add(name, tensor.packed)
            if kept is not None and isinstance(inner, torch.nn.Embedding):
                check_shape(checkpoint.path, name, tensor.shape, inner.weight.shape)
                rows = QuantizedEmbedding(_taken(tensor, device), dtype or torch.float32)
                model.add_module("embed_tokens", rows)
            else:
                _assign_integers(model, name, tensor, checkpoint, device, anywhere=kept is not None)
        else:
            check_kind(checkpoint.path, name, tensor.dtype)
            fingerprint.add(name, tensor)
            # The embedding is copied: the engine keeps it, and what is only looked at would keep its file in memory.
            tensor = tensor.to(dtype=dtype or tensor.dtype, copy=name == "embed_tokens.weight")
            if bits is not None and inner is not None:
                rounded = round_to_nearest(tensor, 8 if outer else bits, GROUP)
                _assign_integers(model, name, rounded, checkpoint, device, anywhere=outer)
            else:
                _assign(model, name, tensor.to(device), checkpoint)
        missing.discard(name)
    if checkpoint.config.tie_word_embeddings:
        missing.discard("lm_head.weight")
    if missing:
        raise FormatError(f"{checkpoint.path}: tensor {min(missing)!r} is missing ({len(missing)} in all)")
    embedding: torch.nn.Module = model.embed_tokens
    if isinstance(embedding, QuantizedEmbedding):
        computed = embedding.dtype
        if checkpoint.config.tie_word_embeddings:
            model.add_module("lm_head", QuantizedLinear(embedding.integers(), None, computed, rounds_inputs=True))
    else:
        computed = model.embed_tokens.weight.dtype
        model.tie()
    if dtype is None:  # files may mix dtypes (norms in float32); computing needs one
        for weight in model.parameters():
            weight.data = weight.data.to(computed)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.dtype = computed
    return model.eval(), fingerprint.hex()


def _matrix(model: Llama, name: str, outer: bool) -> torch.nn.Linear | torch.nn.Embedding | None:
    """The linear layer of a block whose weight this is; with `outer`, the embedding and the output projection too."""
    path, _, leaf = name.rpartition(".")
    with suppress(AttributeError):
        found = model.get_submodule(path) if leaf == "weight" and (outer or path.startswith("layers.")) else None
        return found if isinstance(found, torch.nn.Linear | torch.nn.Embedding) else None
    return None


def _assign(model: Llama, name: str, tensor: torch.Tensor, checkpoint: Checkpoint) -> None:
    owner_name, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(owner_name)
        expected = tuple(getattr(owner, leaf).shape)
    except AttributeError:
        raise strange(checkpoint.path, name) from None
    check_shape(checkpoint.path, name, tensor.shape, expected)
    setattr(owner, leaf, torch.nn.Parameter(tensor))


def _assign_integers(
    model: Llama, name: str, weight: Integers, checkpoint: Checkpoint, device: str | torch.device,
    anywhere: bool = False,
) -> None:  # fmt: skip
    """Put a quantised layer in the place of a linear one, which must be in a block but `anywhere`."""
    path = name.removesuffix(".weight")
    parent, _, leaf = path.rpartition(".")
    try:
        linear = model.get_submodule(path)
    except AttributeError:
        linear = None
    if not isinstance(linear, torch.nn.Linear) or not (anywhere or parent.startswith("layers.")):
        raise FormatError(f"{checkpoint.path}: {path!r} is quantised, but it is not a linear layer of a LLaMA's blocks")
    check_shape(checkpoint.path, name, weight.shape, linear.weight.shape)
    made = QuantizedLinear(_taken(weight, device), None, torch.float32, rounds_inputs=weight.shape[1] % BLOCK == 0)
    made.bias = linear.bias  # filled by its own tensor
    setattr(model.get_submodule(parent), leaf, made)


def _taken(weight: Integers, device: str | torch.device) -> Integers:
    """The same on a device."""
    zero, least = (None if t is None else t.to(device) for t in (weight.zero, weight.least))
    return replace(weight, packed=weight.packed.to(device), scale=weight.scale.to(device), zero=zero, least=least)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of MODEL, of a tokenizer folder, or a `tokenizer.model` file."""
    path = Path(source).expanduser()
    if path.is_dir() and ((path / "tokenizer.json").exists() or (path / "tokenizer.model").exists()):
        return from_folder(path, _rows_of_base(path) if is_adapter(path) else None)
    if path.is_file() and path.suffix == ".model":
        return from_model_file(path)
    path = resolve(source)
    if path.is_dir() and is_adapter(path) and not (path / "tokenizer.json").exists():
        return load_tokenizer(base_of(path))
    if is_gguf(path):
        from camelid.formats.gguf_file import first_of, parse

        return from_gguf(path, parse(first_of(path)).metadata)
    if meta.is_meta(path) and not (path / "tokenizer.model").exists() and (path.parent / "tokenizer.model").exists():
        return from_model_file(path.parent / "tokenizer.model")  # where Meta's downloads of LLaMA 1 and 2 have it
    return from_folder(path, _rows_of_base(path) if path.is_dir() and is_adapter(path) else None)


def _rows_of_base(adapter: Path) -> int | None:
    """How many rows the embedding that an adapter stands on has; None where its base is not here."""
    with suppress(CamelidError):
        return open_model(base_of(adapter, here=True)).config.vocab_size
    return None


def chat_template(adapter: str | Path) -> str | None:
    """The chat template that an adapter brings of its own; None without a tokenizer beside it."""
    path = resolve(adapter)
    return load_tokenizer(path).chat_template if (path / "tokenizer.json").exists() else None


def stop_ids(source: str | Path) -> tuple[int, ...]:
    """Every id that ends a text: `generation_config.json` first (an adapter's before its base's), then the config."""
    checkpoint, own = open_model(source), resolve(source) / "generation_config.json"
    eos = checkpoint.generation.get("eos_token_id")
    if own.is_file():
        eos = read_json(own).get("eos_token_id", eos)
    if eos is None:
        return checkpoint.config.stop_ids
    found = eos if isinstance(eos, list) else [eos]
    bad = next((i for i in found if isinstance(i, bool) or not isinstance(i, int) or i < 0), None)
    if bad is not None:
        raise FormatError(f"{source}: eos_token_id of generation_config.json holds {bad!r}, which is no token's id")
    return tuple(found)


def generation_of(source: str | Path) -> dict[str, Any]:
    """What MODEL's generation_config.json says (an adapter's before its base's), with every id that ends a text."""
    own = resolve(source) / "generation_config.json"
    found = {**open_model(source).generation, **(read_json(own) if own.is_file() else {})}
    found.pop("eos_token_id", None)
    stops = stop_ids(source)
    return found | ({"eos_token_id": list(stops)} if stops else {})


def load_adapters(
    source: str | Path, adapters: Mapping[str, str | Path], dtype: torch.dtype | None = None, bits: int | None = None
) -> Llama:
    """MODEL with adapters by name, none of them active; `bits` as in `read_model`. Raises InputError for one that
    belongs to another base."""
    path = resolve(source)
    if path.is_dir() and is_adapter(path):
        raise InputError(f"{path} is an adapter itself: give its base, {base_of(path)}, and it among the adapters")
    model, fingerprint = read_model(open_model(path), dtype, "cpu", Llama, bits)
    for name, folder in adapters.items():
        attach(model, resolve(folder), name, fingerprint)
    use_adapter(model, None)
    return model.eval()
