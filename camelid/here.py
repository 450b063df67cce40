"""What of a model's life lies in this folder, and the verb that comes next: what `camelid` alone prints."""

from __future__ import annotations

import shlex
from pathlib import Path

PLACES = ("*", "out/*", "runs/*", "quickstart/*", "*/checkpoints/step-*", "*/*/checkpoints/step-*")
KINDS = ("corpus", "tokenizer", "tokens", "checkpoint", "model", "evaluation")
SHOWN = 4  # of a kind


def told() -> str:
    """The lines, or "" when nothing of ours is here."""
    try:
        found = _found(Path.cwd())
    except OSError:  # a folder that is gone, or that may not be read
        return ""
    if not found:
        return ""
    lines = ["", "In this folder:"]
    for kind in KINDS:
        places = found.get(kind, [])
        shown = ", ".join(str(p) for p in places[:SHOWN])
        more = f", and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
        lines += [f"  {kind:<11} {shown}{more}"] if places else []
    return "\n".join([*lines, f"Next: {_next(found)}"]) + "\n"


def _found(folder: Path) -> dict[str, list[Path]]:
    """Finished outputs by kind, newest first; of a run its newest checkpoint stands for it."""
    from camelid.artifact import MANIFEST, read_manifest
    from camelid.errors import InputError

    made: list[tuple[float, str, Path]] = []
    for pattern in PLACES:
        for manifest in folder.glob(f"{pattern}/{MANIFEST}"):
            place = manifest.parent
            run = place.parent.parent if place.parent.name == "checkpoints" else place
            if any(part.startswith(".") for part in place.relative_to(folder).parts):  # something being made
                continue
            try:
                kind = read_manifest(place)["kind"]
            except InputError:
                continue
            if kind not in KINDS:
                continue
            made.append((manifest.stat().st_mtime, kind, run.relative_to(folder)))
    found: dict[str, list[Path]] = {}
    for _, kind, place in sorted(made, reverse=True):
        if place not in found.setdefault(kind, []):
            found[kind].append(place)
    return found


def _next(found: dict[str, list[Path]]) -> str:
    """A command that the person may want."""
    newest = {kind: shlex.quote(str(places[0])) for kind, places in found.items()}
    if model := newest.get("checkpoint") or newest.get("model"):
        return f"camelid generate {model} 'Once upon a time'   (or chat, serve, evaluate, verify, quantize, convert)"
    if "tokens" in newest:
        return f"camelid pretrain recipes/small.toml data.tokens={newest['tokens']}   (camelid plan first)"
    if "corpus" in newest and "tokenizer" in newest:
        return f"camelid tokens build {newest['corpus']} --tokenizer {newest['tokenizer']} --out out/tokens"
    if "corpus" in newest:
        return f"camelid tokenizer train {newest['corpus']} --out out/tokenizer --vocab-size 4096"
    return "camelid corpus build texts/ --out out/corpus"
