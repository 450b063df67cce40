"""Rotary position embedding (arXiv:2104.09864), the half-split layout of Hugging Face checkpoints.

Dimension i of a head is paired with i + head_dim/2. Meta's and GGUF's files pair 2i with 2i+1; `formats/` permutes
the q and k weights while reading (see `interleaved_to_half_split`), so only one layout exists past that door.

Tables are float32 whatever the model's dtype: at position 100,000 a bfloat16 angle is wrong by hundreds of
radians. They are derived from the config on first use and are not buffers, so building on the meta device, casting
and saving cannot lose or round them. The arithmetic follows transformers/modeling_rope_utils.py, term by term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from camelid.kernels.elementwise import turn_pairs
from camelid.model.config import LlamaConfig


@dataclass(frozen=True)
class Rotation:
    """cos and sin for a set of positions: float32 [seq, head_dim/2] or [batch, seq, head_dim/2]."""

    cos: Tensor
    sin: Tensor


def inverse_frequencies(config: LlamaConfig, length: int = 0) -> tuple[Tensor, float]:
    """The angle per position of each pair, float32 [head_dim/2] on the CPU, and the factor on cos and sin.

    `length` is the sequence length so far; only dynamic scaling depends on it.
    """
    scaling, dim, theta = config.rope_scaling, config.head_size, config.rope_theta
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    if scaling.rope_type == "dynamic":
        trained = config.max_position_embeddings
        stretched = scaling.factor * max(length, trained) / trained - (scaling.factor - 1)
        return 1.0 / ((theta * stretched ** (dim / (dim - 2))) ** exponents), 1.0
    if scaling.rope_type == "yarn":
        return _yarn(config, exponents)
    frequencies = 1.0 / (theta**exponents)
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(config, frequencies), 1.0
    return frequencies, 1.0


def _trained_length(config: LlamaConfig) -> int:
    return config.rope_scaling.original_max_position_embeddings or config.max_position_embeddings


def _llama3(config: LlamaConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1 (llama-models, models/llama3/model.py): slow waves are divided by factor, fast ones kept."""
    s, trained = config.rope_scaling, _trained_length(config)
    wavelength = 2 * math.pi / frequencies
    longest, shortest = trained / s.low_freq_factor, trained / s.high_freq_factor
    scaled = torch.where(wavelength > longest, frequencies / s.factor, frequencies)
    smooth = (trained / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    blended = (1 - smooth) * scaled / s.factor + smooth * scaled
    return torch.where((wavelength >= shortest) & (wavelength <= longest), blended, scaled)


def _yarn(config: LlamaConfig, exponents: Tensor) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071, section 3): interpolate pairs that turn less than beta_slow times, keep fast ones."""
    s, dim, theta = config.rope_scaling, config.head_size, config.rope_theta
    trained = _trained_length(config)

    def turning(rotations: float) -> float:  # the pair that turns this many times within the trained context
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turning(s.beta_fast), turning(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    kept = 1 - ramp
    periods = theta**exponents
    frequencies = 1.0 / (s.factor * periods) * (1 - kept) + 1.0 / periods * kept
    return frequencies, _yarn_attention_factor(config)


def _yarn_attention_factor(config: LlamaConfig) -> float:
    s = config.rope_scaling

    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0

    if s.attention_factor is not None:
        return s.attention_factor
    return growth(s.mscale) / growth(s.mscale_all_dim) if s.mscale and s.mscale_all_dim else growth(1.0)


def rotation(config: LlamaConfig, positions: Tensor, length: int = 0) -> Rotation:
    """cos and sin for integer `positions` of any shape; `length` as in `inverse_frequencies`."""
    frequencies, factor = inverse_frequencies(config, length)
    angles = positions[..., None].float() * frequencies.to(positions.device)
    return Rotation(angles.cos() * factor, angles.sin() * factor)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn each pair of x [batch, heads, seq, head_dim] by its position's angle."""
    return turn_pairs(x, by.cos, by.sin)


def interleaved_to_half_split(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a q or k weight (or bias) [heads * head_dim, …] from Meta's pairing to ours."""
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def half_split_to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved_to_half_split`."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
