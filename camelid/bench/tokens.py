"""Tokenizer training and encoding against the libraries that people use, on the same documents and the same vocabulary.

Half of the documents are encoded first; the figure is for the other half, new text on a cache that has seen some. What
a first call does is reported as `cold`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from camelid.bench.race import Contestant, race, ratios
from camelid.tokenizer.byte_level import learn
from camelid.tokenizer.native import character_to_byte
from camelid.tokenizer.patterns import LLAMA3
from camelid.tokenizer.tokenizer import Tokenizer

VOCAB_SIZE = 32_000
PEERS = {
    "tokenizers": ("tokenizers==0.23.3", "numpy"),
    "tiktoken": ("tiktoken==0.14.0", "numpy"),
    "gigatoken": ("gigatoken==0.10.0", "numpy", "awkward"),
    "rustbpe": ("rustbpe==0.1.0", "numpy"),
}


def contestants(threads: Sequence[int]) -> list[Contestant]:
    """Training on one thread, encoding on each of `threads`."""
    settings = (("VOCAB_SIZE", str(VOCAB_SIZE)), ("PATTERN", LLAMA3))
    own, peer = "own_tokens.py", "peer_tokens.py"
    found = [Contestant("camelid", own, "train", settings=settings)]
    found += [Contestant(n, peer, "train", PEERS[n], settings=settings) for n in ("tokenizers", "rustbpe")]
    for count in threads:
        found.append(Contestant("camelid", own, "encode", threads=count))
        found += [Contestant(n, peer, "encode", PEERS[n], count) for n in ("tokenizers", "tiktoken", "gigatoken")]
    return found


def run(texts: Sequence[str], rounds: int, threads: Sequence[int] = (1, 2), quiet: bool = False) -> dict[str, Any]:
    """Rows, ratios, and whether all encoders gave the same ids."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = folder / "documents.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        _vocabulary(texts, folder)
        rows = race(contestants(threads), path, rounds, quiet)
    encoders = [row for row in rows if row["task"] == "encode" and "value" in row]
    same = {row["implementation"]: row["ids"] == encoders[0]["ids"] for row in encoders}
    return {"rows": rows, "ratios": ratios(rows), "same_ids": same}


def _vocabulary(texts: Sequence[str], folder: Path) -> None:
    """One vocabulary in the forms that the contestants read."""
    backend = learn(texts, VOCAB_SIZE, [])
    Tokenizer(backend).save(folder)
    table = character_to_byte()
    ranks = {bytes(table[c] for c in token): i for token, i in backend.get_vocab().items()}
    coded = {base64.b64encode(token).decode(): rank for token, rank in ranks.items()}
    (folder / "ranks.json").write_text(json.dumps(coded), encoding="utf-8")
    (folder / "pattern.txt").write_text(LLAMA3, encoding="utf-8")
