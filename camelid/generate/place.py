"""Where a model runs: on a GPU in torch, on a CPU in the native decoder where that takes it, else in torch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from camelid.errors import InputError
from camelid.formats.checkpoint import Checkpoint
from camelid.generate.native import NativeRunner, native_refusal
from camelid.generate.runner import Runner, TorchRunner
from camelid.kernels.device import free_on_gpu
from camelid.model.config import LlamaConfig
from camelid.model.llama import Llama
from camelid.model.quantized import BITS, QuantizedLinear, is_quantized, quantize_head, quantize_layers, without_least

DEVICES = ("auto", "cpu", "cuda")
SHARE_OF_GPU = 0.8  # of its free memory that weights may take: the rest is for the cache and a step


def runner_for(
    model: Llama, quantization: str | None = None, threads: int | None = None,
    kv_cache: Literal["int8"] | None = None, device: str = "cpu", keep: bool = True,
) -> Runner:  # fmt: skip
    """What runs a model that is on the CPU; the torch model is rounded in place and taken to its `device`. Arguments as
    in `Engine.from_pretrained`; without `keep` the native decoder takes the model apart. Raises InputError when a model
    is to be rounded that is rounded already."""
    bits = BITS[quantization] if quantization else None
    already = is_quantized(model)
    if already and bits is not None:
        raise InputError(f"quantization={quantization!r}: the model is quantised already; open it without")
    layers = weight_bytes(model.layers) + widening(model)
    rounded = layers * (bits + 0.5) / (8 * model.dtype.itemsize) if bits else layers
    weights = weight_bytes(model) - weight_bytes(model.layers) + rounded
    own_head = (already or bits is not None) and isinstance(model.lm_head, nn.Linear)
    if model.config.tie_word_embeddings and own_head:  # the head becomes a matrix of its own
        weights += model.config.vocab_size * model.config.hidden_size * 8.5 / 8
    elif model.config.tie_word_embeddings and already:  # its buffers are the embedding's, until they are taken to a GPU
        weights += weight_bytes(model.embed_tokens)
    on_gpu = takes_gpu(weights, device)
    if not on_gpu and native_refusal(model) is None:
        return NativeRunner(model, bits, threads, cache=torch.int8 if kv_cache else None, keep=keep)
    if bits is not None:
        quantize_layers(model, bits)
    if already or bits is not None:
        quantize_head(model)
    if on_gpu:
        without_least(model)
        model.to("cuda")
    return TorchRunner(model, integers=kv_cache is not None)


def takes_gpu(weights: float, device: str) -> bool:
    """Whether a model of so many bytes goes to the GPU: with "auto" where there is one and room for it. Raises
    InputError for "cuda" without either."""
    if device not in DEVICES:
        raise InputError(f"device is {device!r}; it can be {', '.join(DEVICES)}")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return False
    if not torch.cuda.is_available():
        raise InputError("device is 'cuda', but torch sees no GPU: camelid doctor says why")
    room = SHARE_OF_GPU * free_on_gpu()
    if device == "cuda" and weights > room:
        raise InputError(
            f"the weights take {weights / 2**30:.1f} GiB and the GPU has room for {room / 2**30:.1f}: open the model "
            "with quantization int8 or int4, or on the CPU"
        )
    return weights <= room


def widening(model: Llama) -> int:
    """Bytes that `without_least` would add: a weight and its share of scales take 8.5 bits instead of 5."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear) and m.least is not None]
    return sum(m.in_features * m.out_features for m in layers) * 7 // 16


def weight_bytes(module: nn.Module) -> int:
    """Of all weights as they are; a tied projection counts once."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def bytes_to_run(config: LlamaConfig, itemsize: int, bits: int | None) -> int:
    """Of the weights that the native decoder holds of a model whose numbers take `itemsize`, as it is or rounded to
    `bits`: with a scale of two bytes for every 32, the output projection in int8, and the embedding as it is."""
    embedding = config.vocab_size * config.hidden_size
    layers = config.num_parameters() - embedding * (1 if config.tie_word_embeddings else 2)
    if bits is None:
        return (layers + 2 * embedding) * itemsize
    return layers * (2 * bits + 1) // 16 + embedding * 17 // 16 + embedding * itemsize


def bytes_as_it_is(checkpoint: Checkpoint) -> int:
    """Bytes of the weights of a quantised model as the native decoder holds them: a plain output projection in int8."""
    config, tensors = checkpoint.config, checkpoint.tensors()
    head = tensors.pop("lm_head.weight", None)
    if checkpoint.format == "hf":  # its integers are ours
        held = sum(file.stat().st_size for file in checkpoint.path.glob("*.safetensors"))
        held -= head.nbytes if head else 0
    else:
        held = sum(stored.integer_bytes or stored.nbytes for stored in tensors.values())
    shared = head or tensors["embed_tokens.weight"]
    return held + (shared.integer_bytes or config.vocab_size * config.hidden_size * 17 // 16)
