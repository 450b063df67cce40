"""What on this machine makes camelid slow or leaves a part of it out, what that costs, and what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """`fix` is empty when there is nothing to do."""

    name: str
    status: Literal["good", "slow", "missing"]
    detail: str
    fix: str = ""


def examine() -> dict[str, Any]:
    """ok (nothing is slow) and the findings, as plain data."""
    found = [finding for look in LOOKS for finding in look()]
    return {"ok": all(f.status != "slow" for f in found), "findings": [asdict(f) for f in found]}


def _native() -> Iterator[Finding]:
    import torch

    from camelid.kernels import library
    from camelid.kernels.decoder import level

    cost = "generation, tokenizing and training on a CPU take two to ten times as long"
    if library.library() is not None:
        wide = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
        if wide and level() == "plain":
            told = "it has its plain kernels only, as clang builds it: generation on a CPU takes several times as long"
            yield Finding("native library", "slow", told, "install g++, then install camelid again with CXX=g++")
        else:
            yield Finding("native library", "good", f"loaded, {level() or 'plain'}")
    elif os.environ.get("CAMELID_NATIVE") == "0":
        yield Finding("native library", "slow", f"switched off: {cost}", "unset CAMELID_NATIVE")
    elif library.PATH.exists():
        told = f"{library.PATH} does not load, or is of another version: {cost}"
        yield Finding("native library", "slow", told, "install camelid again")
    elif not any(map(shutil.which, ("c++", "g++", "clang++"))):
        told = f"not built, for there was no C++ compiler: {cost}"
        yield Finding("native library", "slow", told, "install g++ or clang, then install camelid again")
    else:
        yield Finding("native library", "slow", f"not built: {cost}", "install camelid again; its build says why not")


def _processor() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        return
    capability = torch.backends.cpu.get_cpu_capability()
    if torch.cpu._is_avx512_bf16_supported():
        yield Finding("processor", "good", f"{capability} with bfloat16: training multiplies in it")
    else:
        told = f"{capability} without bfloat16: training computes in float32, at about a third of the speed"
        yield Finding("processor", "good", told)


def _threads() -> Iterator[Finding]:
    import torch

    from camelid.kernels.threads import processors, quota

    mine, limited = processors(), quota()
    used = torch.get_num_threads()
    limit = next((name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if os.environ.get(name)), None)
    if used * 2 <= mine and limit:
        told = f"{used} of {mine} processors: {limit} is {os.environ[limit]}"
        yield Finding("threads", "slow", told, f"unset {limit}")
    elif limited is not None and limited < used:
        told = f"{used} threads share {limited:g} processors, which this container may use: they wait for each other"
        yield Finding("threads", "slow", told, f"export OMP_NUM_THREADS={max(1, int(limited))}")
    else:
        yield Finding("threads", "good", f"{used} on {mine} processors")


def _gpu() -> Iterator[Finding]:
    import torch

    from camelid.kernels.device import compiles

    if torch.cuda.is_available():
        yield Finding("GPU", "good", torch.cuda.get_device_name())
        if not compiles():
            told = "no code can be made for it: training takes about twice as long, generating several times"
            cure = "pip install triton; install a C compiler (gcc) and Python's headers (python3-dev)"
            yield Finding("compiling", "slow", told, cure)
    elif shutil.which("nvidia-smi"):
        told = f"there is one, but torch {torch.__version__} does not see it"
        yield Finding("GPU", "slow", told, "pip install a torch built for CUDA: https://pytorch.org/get-started")


def _extras() -> Iterator[Finding]:
    """The packages of camelid[all], and what is missing without them."""
    for extra, use in {
        "data": "corpora and sentencepiece tokenizers", "evaluate": "BLEU, and ROUGE's stemmer", "hub": "hub ids",
        "constrain": "JSON schemas and regular expressions", "chat": "line editing in `camelid chat`",
        "serve": "`camelid serve`",
    }.items():  # fmt: skip
        missing = [name for name in _packages(extra) if not _installed(name)]
        if missing:
            told = f"{', '.join(missing)}: {use}"
            yield Finding(f"extra {extra}", "missing", told, f"pip install 'camelid[{extra}]'")


def _packages(extra: str) -> list[str]:
    """The packages that an extra asks for, by the installed camelid."""
    try:
        lines = requires("camelid") or []
    except PackageNotFoundError:
        return []
    ours = [line.partition(";")[0] for line in lines if f"extra == '{extra}'" in line.replace('"', "'")]
    return ["".join(c for c in line if c not in " ()").partition(">")[0].partition("[")[0] for line in ours]


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return find_spec(package.replace("-", "_")) is not None


def _text() -> Iterator[Finding]:
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    if encoding not in ("utf8", ""):
        yield Finding(
            "terminal", "slow", f"its encoding is {sys.stdout.encoding}: Chinese is lost", "export PYTHONUTF8=1"
        )


def _room() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free
    status: Literal["good", "slow"] = "good" if free > 2 * 2**30 else "slow"
    fix = "" if status == "good" else "make room, or work in another folder"
    yield Finding("disk", status, f"{free / 2**30:,.1f} GiB free in this folder", fix)


LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (_native, _processor, _threads, _gpu, _room, _text, _extras)
