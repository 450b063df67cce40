"""What is stored: files, tensors, numbers, and whether a copy is the same."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from camelid.artifact import MANIFEST, damage
from camelid.errors import InputError
from camelid.formats import gguf_write
from camelid.formats.hf import save
from camelid.formats.load import load, load_tokenizer, stop_ids
from camelid.model.llama import Llama
from camelid.model.quantized import is_quantized
from camelid.verify.checklist import Check, Failed, NotApplicable, Subject

LARGEST_COPY = 8 << 30  # bytes: a larger model is not copied to be checked


def files(subject: Subject) -> str:
    """Every file's SHA-256 against the manifest."""
    if not (subject.path / MANIFEST).is_file():
        raise NotApplicable(f"there is no {MANIFEST} to compare the files with")
    wrong = damage(subject.path)
    if wrong:
        raise Failed(wrong)
    return "every file is as it was written"


def tensors(subject: Subject) -> str:
    """Opens strictly: each tensor of the architecture is there, in the config's shape, and no other."""
    count = subject.model.num_parameters()
    label = subject.checkpoint.quantized
    return f"{count:,} parameters in the config's shapes" + (f", rounded ({label})" if label else "")


def numbers(subject: Subject) -> str:
    """Finite weights, of sizes that a trained or fresh model has."""
    for name, parameter in subject.weights.named_parameters():
        weight = parameter.detach()
        finite = torch.isfinite(weight)
        if not bool(finite.all()):
            raise Failed(f"{name} holds {int((~finite).sum())} NaN or infinite numbers")
        largest = float(weight.abs().max())
        typical = float(weight.abs().median())
        if largest > 1e4 and largest > 1e3 * max(typical, 1e-30):
            raise Failed(f"{name} holds {largest:.3g}, where {typical:.3g} is usual: a bit has flipped?")
        if weight.dim() == 2 and not bool(weight.any()):
            raise Failed(f"{name} is all zeros")
    return "all weights are finite, none is out of proportion"


def tied(subject: Subject) -> str:
    """The output projection: shared as the config says, if the files hold one."""
    shared = subject.checkpoint.config.tie_word_embeddings
    says = "as the config says"
    looked_at = ("embed_tokens.weight", "lm_head.weight")
    kept = {name: stored.read() for name, stored in subject.checkpoint.tensors().items() if name in looked_at}
    if "lm_head.weight" not in kept or "embed_tokens.weight" not in kept:
        if not shared:
            raise NotApplicable("the tensors do not open")
        return f"the embedding is the output projection, {says}"
    head, embedding = kept["lm_head.weight"], kept["embed_tokens.weight"]
    if not isinstance(head, torch.Tensor) or not isinstance(embedding, torch.Tensor):
        return "the output projection is rounded, and its own"
    same = head.shape == embedding.shape and torch.equal(head, embedding)
    if shared and not same:
        raise Failed("tie_word_embeddings is true, but the file's lm_head differs from the embedding and is not used")
    if same and not shared:
        return "the output projection is kept by itself, as the config says, and equals the embedding"
    return f"the output projection is {'the embedding' if same else 'its own'}, {says}"


def copy(subject: Subject) -> str:
    """Written and read again: the same bits."""
    _can_be_copied(subject)
    model: Llama = load(subject.path)
    if is_quantized(model) and subject.path.is_file():
        raise NotApplicable("a rounded GGUF file has no folder of its own kind")
    with tempfile.TemporaryDirectory() as place:
        save(model, Path(place) / "copy")
        _same(model, load(Path(place) / "copy"))
    return "a saved copy opens with the same bits"


def gguf(subject: Subject) -> str:
    """Written as GGUF and read again: the same bits, the same tokens."""
    _can_be_copied(subject)
    model: Llama = load(subject.path)
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[model.dtype]
    if is_quantized(model):
        raise NotApplicable("rounded layers would be written in full")
    if len(subject.words) > model.config.vocab_size:
        raise NotApplicable("the tokenizer does not fit the embedding")
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "copy.gguf"
        try:
            gguf_write.write(
                model.config, dict(model.named_parameters()), subject.words, path, kind, stop_ids(subject.path)
            )
        except InputError as error:  # the format has no word for it, which it says
            raise NotApplicable(str(error)) from None
        _same(model, load(path, dtype=model.dtype))
        text = "The meaning of life, 骆驼 and café: 1 + 1 = 2."
        if load_tokenizer(path).encode(text) != subject.words.encode(text):
            raise Failed("the GGUF copy cuts a text into other tokens")
        ends = set(stop_ids(subject.path)) - set(stop_ids(path))
        if ends:
            raise Failed(f"the GGUF copy does not stop at {', '.join(map(subject.words.token, sorted(ends)))}")
    return f"a {kind} copy opens with the same bits and cuts text the same"


def _can_be_copied(subject: Subject) -> None:
    if subject.adapted:
        raise NotApplicable("an adapter: camelid merge makes a model of it, which can be copied")
    if subject.weights.num_parameters() * 4 > LARGEST_COPY:
        raise NotApplicable("the model is too large to be copied for a check")


def _same(model: Llama, other: Llama) -> None:
    theirs = other.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in theirs or not torch.equal(tensor, theirs[name]):
            raise Failed(f"{name} came back changed")


CHECKS = [
    Check("files", "a damaged or exchanged file", files),
    Check("tensors", "missing, left over or misshapen tensors; a vocabulary off by one", tensors),
    Check("numbers", "NaN, a flipped bit in an exponent", numbers),
    Check("tied", "a wrong tie_word_embeddings: an output projection that is silently not used", tied),
    Check("copy", "a save or a load that loses something", copy),
    Check("gguf", "a permutation or a token lost on the way to llama.cpp", gguf),
]
