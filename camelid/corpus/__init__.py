"""Files to clean documents: read, repair, filter, deduplicate, count."""

from __future__ import annotations

from camelid.corpus.run import build, documents

__all__ = ["build", "documents"]
