"""Model files in and out: Hugging Face folders (native), Meta's, GGUF and PEFT's adapters, each over the same named
tensors."""

from __future__ import annotations

from camelid.formats.hf import save
from camelid.formats.load import load, open_model

__all__ = ["load", "open_model", "save"]
