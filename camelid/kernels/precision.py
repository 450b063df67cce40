"""Which dtype a product is made in."""

from __future__ import annotations

import torch
from torch import Tensor


def native_dtype(device: torch.device) -> torch.dtype:
    """What `device` multiplies fastest without losing a model: bfloat16 where the hardware has it, else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def product_dtype(x: Tensor) -> torch.dtype:
    """Autocast's, where it is on for x's device, else x's own, and always float64's own: what autocast would do, for
    products that it does not see."""
    kind = x.device.type
    cast = x.dtype != torch.float64 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if cast else x.dtype
