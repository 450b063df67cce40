"""Teach a model: files of examples -> records -> token ids and what is learned of them -> the one training loop."""

from __future__ import annotations

from camelid.finetune.job import finetune

__all__ = ["finetune"]
