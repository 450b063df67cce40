"""Opens broken models in a process of its own, under limits and an audit hook: `child.py KIND FOLDER FIRST COUNT made`.

Case n is a copy of the sound model in FOLDER with the damage that a generator seeded by n decides. Each must open or be
refused by our own exceptions, within two seconds and a bound on memory, without a process, a socket or a file
elsewhere. With `made` it is the n-th of those made by hand (handmade.py), which must be refused, the folder or a file
named. Prints one JSON object: the findings, and how many cases were opened and refused.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

SECONDS, MEMORY = 2.0, 64 << 20
NUMBERS = (0, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
FORBIDDEN = (
    "subprocess",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "socket",
    "ctypes.dlopen",
    "pty",
    "webbrowser",
)


def bytes_damage(rng: random.Random, data: bytes) -> bytes:
    """A few faults near the front of a file, where its structure is."""
    broken = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        end = min(len(broken), rng.choice((64, 512, 4096, len(broken)))) or 1
        at = rng.randrange(end)
        kind = rng.randrange(7)
        if kind == 0:
            broken[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            broken[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS) % 2**64)
        elif kind == 2:
            broken[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) % 2**32)
        elif kind == 3:
            del broken[rng.randrange(len(broken) + 1) :]
        elif kind == 4:
            del broken[at : at + rng.randrange(1, 64)]
        elif kind == 5:
            broken[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 64)))
        else:
            start = rng.randrange(len(broken) or 1)
            broken[at : at + 32] = broken[start : start + 32]
        if not broken:
            return b""
    return bytes(broken)


VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 10**6, 2**63, 1.5, 1e308, float("nan"), "", "x", "../../etc/passwd", "/etc/passwd",
    "a" * 5000, [], [1], {}, {"a": 1}, [[[[]]]],
)  # fmt: skip


def json_damage(rng: random.Random, data: bytes) -> bytes:
    """Another value, no value or a new key somewhere in a JSON file; now and then broken bytes."""
    if rng.random() < 0.2:
        return bytes_damage(rng, data)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        node: Any = value
        while True:
            if isinstance(node, dict) and node:
                key: Any = rng.choice(list(node))
            elif isinstance(node, list) and node:
                key = rng.randrange(len(node))
            else:
                break
            if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
                node = node[key]
                continue
            if rng.random() < 0.25:
                del node[key]
            else:
                node[key] = rng.choice(VALUES)
            break
    return json.dumps(value).encode()


def damage(rng: random.Random, folder: Path, names: list[str]) -> None:
    name = rng.choice(names)
    path = folder / name
    change = json_damage if path.suffix == ".json" else bytes_damage
    path.write_bytes(change(rng, path.read_bytes()))


def open_all(folder: Path, kind: str) -> None:
    """Everything that a loader reads of a model."""
    from camelid.formats.load import load, load_tokenizer, open_model, stop_ids

    if kind == "tokenizer":
        words = load_tokenizer(folder)
        words.decode(words.encode("The meaning of 骆驼 <|eot_id|>"))
        if words.chat_template:
            words.apply_chat_template([{"role": "user", "content": "a"}])
        return
    source = next(folder.glob("*.gguf"), folder)
    open_model(source)
    load(source)
    load(source, integers=True)  # as the engine does
    stop_ids(source)
    if kind == "gguf":
        load_tokenizer(source)


# What of each kind is damaged.
KINDS: dict[str, list[str]] = {
    "safetensors": ["model.safetensors"],
    "config": ["config.json", "generation_config.json", "model.safetensors.index.json"],
    "gguf": ["model.gguf"],
    "pth": ["consolidated.00.pth", "params.json"],
    "tokenizer": ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
    "quantized": ["config.json", "model.safetensors"],
}


def watch(folder: Path, events: list[str]) -> None:
    inside = (
        str(folder),
        sys.prefix,
        sys.base_prefix,
        "/proc/self",
        "/sys/",
        "/dev/null",
        str(Path(__file__).parents[2]),
    )

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN):
            events.append(f"{event} {args!r:.100}")
        elif event == "open" and isinstance(args[0], str) and not args[0].startswith(inside):
            events.append(f"open {args[0]!r:.100}")

    sys.addaudithook(hook)


def by_chance(kind: str, number: int, work: Path) -> str:
    damage(random.Random(number), work, [name for name in KINDS[kind] if (work / name).exists()])
    return f"{kind} {number}"


def by_hand(kind: str, number: int, work: Path) -> str:
    from tests.fuzz.handmade import CASES

    name, change = next(islice(CASES[kind](), number, None))
    change(work)
    return f"{kind} {number}, {name}"


def one(work: Path, kind: str) -> tuple[str, str]:
    """("opened" or "refused" or "fault", what happened)."""
    from camelid.errors import InputError

    begun = time.monotonic()
    try:
        open_all(work, kind)
        outcome = ("opened", "")
    except InputError as error:
        outcome = ("refused", str(error))
        if not str(error).strip():
            return "fault", "an empty message"
    except BaseException as error:  # whatever it is, it is not ours
        return "fault", f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - begun
    return ("fault", f"{seconds:.1f} s") if seconds > SECONDS else outcome


def run(kind: str, sound: Path, first: int, count: int, made: bool) -> dict[str, Any]:
    work = sound.parent / f"work-{kind}-{first}"
    open_all(sound, kind)  # imports, and the baseline of memory
    largest = max(path.stat().st_size for path in sound.iterdir())
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_CPU, (60 + count, 60 + count))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
    events: list[str] = []  # of the loader; what the damage itself did is no event
    watch(sound.parent, events)
    found: list[str] = []
    tally = {"opened": 0, "refused": 0}
    for number in range(first, first + count):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(sound, work)
        name = (by_hand if made else by_chance)(kind, number, work)
        events.clear()
        outcome, detail = one(work, kind)
        if events:
            outcome, detail = "fault", events.pop()
        elif made and outcome == "opened":
            outcome, detail = "fault", "opened"
        elif made and outcome == "refused" and not named(detail, work):
            outcome, detail = "fault", f"names no file: {detail}"
        if outcome == "fault":
            found.append(f"{name}: {detail}")
        else:
            tally[outcome] += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - baseline
    if grown > 3 * largest + MEMORY:
        found.append(f"{kind}: memory grew by {grown >> 20} MiB")
    shutil.rmtree(work, ignore_errors=True)
    return {"found": found, **tally}


def named(message: str, work: Path) -> bool:
    """Whether a refusal says where the fault is: a file, or the chat template, which a model has one of."""
    places = [str(work), "the chat template", *(path.name for path in work.iterdir())]
    return any(place in message for place in places)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    kind, sound, first, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    print(json.dumps(run(kind, sound, first, count, "made" in sys.argv[5:])))
