"""One record of the input, on its way to becoming a document of the corpus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "code", "html", "web", "wiki"]
"""text and code: as written. html: a page, its main text still to be found. web: text that somebody already took
out of a page (WET). wiki: MediaWiki markup."""

Outcome = Literal["kept", "dropped", "quarantined"]

MAX_RECORD_BYTES = 64 * 2**20
"""A record longer than this is quarantined: it would decide how much memory a worker needs."""


@dataclass(frozen=True, slots=True)
class Document:
    """A record as it was read.

    `size` is what the record takes up in the (decompressed) input, so that the sizes of a file's records add up to
    the file. `fault` says why it could not be read (it is quarantined), `skip` why it is no document at all (a
    redirect, a record of HTTP headers); otherwise `text` is its text.
    """

    source: str
    size: int
    text: str = ""
    kind: Kind = "text"
    fault: str | None = None
    skip: str | None = None
