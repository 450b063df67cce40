"""A search, led by which lines of camelid run, for bytes that a reader of `targets` neither takes nor refuses.

python -m tests.fuzz.guided READER [--seconds 600] [--kept FOLDER]: needs `pip install atheris`. Ends with 1 and the
bytes in a file when something is found: put that file into tests/fuzz/found/READER/.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from .child import bytes_damage, json_damage

LARGEST = 1 << 16  # bytes
JSON = {"safetensors", "config", "tokenizer", "rows", "request", "manifest"}  # bytes alone seldom stay JSON


def changed(data: bytes, largest: int, seed: int) -> bytes:
    """Another value somewhere in the first JSON that the bytes hold; now and then other bytes."""
    rng = random.Random(seed)
    begin = min((at for at in (data.find(b"{"), data.find(b"[")) if at >= 0), default=0)
    text = data[begin:].decode("utf-8", "surrogateescape")
    try:
        size = len(text[: json.JSONDecoder().raw_decode(text)[1]].encode("utf-8", "surrogateescape"))
        new = json_damage(rng, data[begin : begin + size])
    except (ValueError, RecursionError):
        return bytes_damage(rng, data)[:largest]
    counted = data[:begin] == struct.pack("<Q", size)  # safetensors tells how long its header is
    return ((struct.pack("<Q", len(new)) if counted else data[:begin]) + new + data[begin + size :])[:largest]


def main() -> None:
    import atheris

    parser = argparse.ArgumentParser()
    parser.add_argument("reader")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--kept", type=Path, help="a folder of bytes that led somewhere new, to go on from")
    options = parser.parse_args()
    with TemporaryDirectory() as scratch, atheris.instrument_imports(include=["camelid", "tomllib"]):
        from .seeds import seeds
        from .targets import TARGETS, taken

        reader = TARGETS[options.reader]
        work, begun = Path(scratch) / "work", Path(scratch) / "seeds"
        work.mkdir()
        begun.mkdir()
        for number, data in enumerate(seeds()[options.reader]):
            assert taken(reader, data, work), f"seed {number} is refused"  # and what the reader imports is instrumented
            (begun / str(number)).write_bytes(data)
        kept = options.kept or Path(scratch) / "kept"
        kept.mkdir(parents=True, exist_ok=True)
        limits = [f"-max_total_time={options.seconds}", "-timeout=60", "-rss_limit_mb=4096", f"-max_len={LARGEST}"]
        words = [sys.argv[0], *limits, f"-artifact_prefix={options.reader}-", str(kept), str(begun)]
        more = {"custom_mutator": changed} if options.reader in JSON else {}
        atheris.Setup(words, lambda data: taken(reader, data, work), **more)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
