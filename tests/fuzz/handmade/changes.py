"""What may be done to a file of a model, of whatever kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

Change = Callable[[Path], None]
Cases = Iterator[tuple[str, Change]]
NAN, INF, LARGE = float("nan"), float("inf"), 2**63
GONE = object()
LAYER = "model.layers.0.self_attn.q_proj.weight"


def edited(name: str, keys: tuple[str, ...], value: Any, folder: Path) -> None:
    """One field of a JSON file set to `value`, or taken out."""
    path = folder / name
    whole = json.loads(path.read_text())
    node = whole
    for key in keys[:-1]:
        node = node.setdefault(key, {})
    if value is GONE:
        node.pop(keys[-1], None)
    else:
        node[keys[-1]] = value
    path.write_text(json.dumps(whole))


def written(name: str, data: bytes, folder: Path) -> None:
    (folder / name).write_bytes(data)


def field(name: str, key: str, *values: Any, inside: tuple[str, ...] = ()) -> Cases:
    for value in values:
        told = "gone" if value is GONE else repr(value)[:30]
        yield f"{name}: {'.'.join((*inside, key))} {told}", partial(edited, name, (*inside, key), value)


NOT_JSON: dict[str, bytes] = {
    "empty": b"", "a list": b"[]", "null": b"null", "a number": b"7", "cut off": b'{"a": ', "zeros": bytes(99),
    "not UTF-8": b'{"a": "\xff\xfe"}', "deep": b'{"a":' * 100_000, "deep lists": b"[" * 100_000,
    "a number of 5,000 digits": b'{"vocab_size": ' + b"9" * 5000 + b"}", "two objects": b"{}{}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
}  # fmt: skip


def not_json(name: str) -> Cases:
    for told, data in NOT_JSON.items():
        yield f"{name}: {told}", partial(written, name, data)


def cut(name: str, share: float, folder: Path) -> None:
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def grown(name: str, more: bytes, folder: Path) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes() + more)
