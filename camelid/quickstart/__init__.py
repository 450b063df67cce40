"""The whole life of a model on text found on any machine: the running interpreter's standard library."""

from __future__ import annotations

from camelid.quickstart.life import run

__all__ = ["run"]
