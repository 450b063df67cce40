"""Texts to score: files of any kind that the corpus reads, a corpus folder, or a tokens folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from camelid.artifact import MANIFEST, read_manifest
from camelid.corpus import documents
from camelid.corpus.clean import plain_text
from camelid.corpus.read import find_files, read
from camelid.errors import InputError
from camelid.tokenizer.tokenizer import Tokenizer
from camelid.tokens.write import INDEX, STARTS, TOKENS


@dataclass(frozen=True)
class Text:
    """A document to score: where it came from, what it says, and its ids without BOS and EOS."""

    name: str
    text: str
    ids: list[int]


def files_of(data: str | Path) -> list[Path]:
    """What a manifest names of `data`: a folder of camelid's as it is, else the files of a folder, a glob or a name."""
    path = Path(data).expanduser()
    return [path] if (path / MANIFEST).exists() else find_files([str(data)])


def read_texts(data: Path, tokenizer: Tokenizer) -> list[Text]:
    """The documents of `data`. Raises InputError naming what cannot be read, or tokens of another tokenizer."""
    if not (data / MANIFEST).exists():
        found = [d for path in find_files([str(data)]) for d in read(path)]
        bad = next((d for d in found if d.fault), None)
        if bad is not None:
            raise InputError(f"--data: {bad.source} cannot be read ({bad.fault})")
        kept = [d for d in found if not d.skip]
        return encoded([d.source for d in kept], [plain_text(d) for d in kept], tokenizer)
    kind = read_manifest(data)["kind"]
    if kind == "tokens":
        return _of_shards(data, tokenizer)
    if kind != "corpus":
        raise InputError(f"--data: {data} is a {kind} folder: give a text file, a corpus or a tokens folder")
    texts = list(documents(data))
    return encoded([f"{data.name} document {n}" for n in range(1, len(texts) + 1)], texts, tokenizer)


def encoded(names: list[str], texts: list[str], tokenizer: Tokenizer) -> list[Text]:
    """Texts with their names and ids; nothing in them is parsed for control tokens."""
    return [Text(*one) for one in zip(names, texts, tokenizer.encode_documents(texts), strict=True)]


def _of_shards(folder: Path, tokenizer: Tokenizer) -> list[Text]:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    if index["tokenizer_digest"] != tokenizer.digest():
        raise InputError(
            f"--data: {folder} was made with another tokenizer than the model's: give the corpus it was made from"
        )
    data = np.memmap(folder / TOKENS, dtype=index["dtype"], mode="r")
    starts = np.load(folder / STARTS)
    before = 0 if tokenizer.bos_token_id is None else 1
    found = []
    for number, (start, end) in enumerate(pairwise(starts), 1):
        ids = data[int(start) + before : int(end) - 1].tolist()
        found.append(Text(f"{folder.name} document {number}", tokenizer.decode(ids), ids))
    return found
