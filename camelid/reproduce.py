"""Make a folder again from what its manifest says, beside it, and compare: the same files, bit for bit?

A folder that a command made is made by that command again, in the folder that the command was given in; a checkpoint,
by its recipe as it was resolved. Pages and cards hold times and are not compared. The command comes with the folder, so
only verbs that make a folder from data are repeated, and none that runs a model's programs.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from camelid import child
from camelid.artifact import MANIFEST, lineage, read_manifest, versions
from camelid.errors import CamelidError, InputError
from camelid.recipe import parse

NOT_COMPARED = ("report.html", "README.md")


REPEATED = ("corpus", "tokenizer", "tokens", "merge", "quantize", "convert", "evaluate")


def reproduce(folder: Path) -> dict[str, Any]:
    """Run the last step to `folder` again. Returns ok, kind, files ({name, same}), settings and versions that differ.

    Raises InputError when the manifest does not say how the folder was made, an input has changed since, or the step is
    not one to repeat.
    """
    folder = folder.resolve()
    manifest = read_manifest(folder)
    gone = [node["path"] for node in lineage(folder)["inputs"] if node["changed"]]
    if gone:
        raise InputError(f"{gone[0]} is not what it was when {folder} was made from it: there is nothing to compare")
    beside = folder.parents[1] if folder.parent.name == "checkpoints" else folder  # not within a run
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.", dir=beside.parent) as scratch:
        again = _made(manifest, folder, Path(scratch) / folder.name)
        found = read_manifest(again)
    files = [
        {"name": name, "same": found["files"].get(name) == manifest["files"].get(name)}
        for name in {**manifest["files"], **found["files"]}
        if Path(name).name not in NOT_COMPARED
    ]
    return {
        "ok": all(file["same"] for file in files),
        "folder": str(folder),
        "kind": manifest["kind"],
        "files": files,
        "settings": _different(manifest["settings"], found["settings"]),
        "versions": _different(manifest["versions"], versions()),
    }


def _made(manifest: Mapping[str, Any], folder: Path, out: Path) -> Path:
    """The same step into `out`; the folder to compare."""
    made = manifest.get("made_by", {})
    words, place = list(made.get("command", [])), Path(made.get("folder", "."))
    if made and not place.is_dir():
        raise InputError(f"{place}, in which the command was given, is not there any more: its paths lead nowhere")
    if manifest["kind"] == "checkpoint":
        with chdir(place):
            return _trained(manifest, out)
    if not words or words[0] == "quickstart":
        raise InputError(
            f"{folder / MANIFEST} names no command of one step: it was made from Python, as a part of the quickstart "
            "or before camelid wrote the command down. Its inputs may say more: camelid lineage"
        )
    if words[0] not in REPEATED or "--execute" in words:
        raise InputError(f"`camelid {' '.join(words)}` made {folder}: that is not a command to repeat on trust")
    if "-" in words:
        raise InputError(f"{folder} was made from standard input, which is gone")
    words = _elsewhere(words, out)
    print(f"in {place}: camelid {' '.join(words)}", file=sys.stderr)
    done = subprocess.run(
        child.python("from camelid.cli import main; main()", *words), cwd=place, stdout=subprocess.DEVNULL
    )
    if done.returncode:
        raise CamelidError(f"`camelid {' '.join(words)}` ended with {done.returncode}: see above")
    return out


def _elsewhere(words: Sequence[str], out: Path) -> list[str]:
    """A command with another --out."""
    made, taken = list(words), False
    for at, word in enumerate(words):
        if word == "--out" and at + 1 < len(words):
            made[at + 1], taken = str(out), True
        elif word.startswith("--out="):
            made[at], taken = f"--out={out}", True
    if not taken:
        raise InputError(f"`camelid {' '.join(words)}` names no --out: it cannot be run into another folder")
    return made


def _trained(manifest: Mapping[str, Any], out: Path) -> Path:
    """The checkpoint of the same step, by the recipe. All of the run is repeated: its schedule is one."""
    settings, step = manifest["settings"], manifest["state"]["step"]
    if settings["train"].get("minutes"):
        raise InputError("train.minutes made the run as long as the clock allowed: no other run is the same")
    kept = {**settings["checkpoint"], "every": step, "keep": manifest["state"]["steps"] // step + 1}
    raw = {**settings, "checkpoint": kept, "log": {**settings["log"], "out": str(out)}}
    recipe = parse(raw, str(out.name))
    if recipe.finetune:
        from camelid.finetune import finetune as run
    else:
        from camelid.train import pretrain as run
    from camelid.train.guard import check_whole

    check_whole(run(recipe))
    return out / "checkpoints" / f"step-{step:08}"


def _different(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{name: [then, now]} of what is not the same; a run's own place does not count."""
    names = [n for n in {**then, **now} if n not in ("log", "checkpoint")]
    return {n: [then.get(n), now.get(n)] for n in names if then.get(n) != now.get(n)}
