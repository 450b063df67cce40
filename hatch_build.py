"""Builds the native library into the package when a C++ compiler is at hand; without one the package works as it is."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
TARGET = ROOT / "camelid" / "kernels" / "libcamelid.so"
# -O3 for the baseline of the platform; loops that gain from wider registers choose theirs at load (target_clones).
FLAGS = [
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-std=c++17",
    "-fPIC",
    "-Wall",
    "-pthread",
    "-fno-semantic-interposition",
]


def compile_library() -> bool:
    """Compile native/*.cpp, on all cores. Returns whether there is a library now."""
    named = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    compiler = shlex.split(named or "")
    if not compiler:
        print("camelid: no C++ compiler found, the native library is left out", file=sys.stderr)
        return False
    part = TARGET.with_suffix(".so.part")
    with TemporaryDirectory() as scratch:
        sources = sorted((ROOT / "native").glob("*.cpp"))
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        commands = [
            [*compiler, *FLAGS, "-c", "-o", made, source] for made, source in zip(objects, sources, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            results = list(workers.map(_compile, commands))
        results.append(_run([*compiler, "-shared", "-pthread", "-o", part, *objects]))
    failed = next((r for r in results if r.returncode), None)
    if failed:
        print(f"camelid: the native library does not compile here and is left out:\n{failed.stderr}", file=sys.stderr)
        return False
    part.replace(TARGET)
    return True


def _is_new() -> bool:
    """Whether the library that lies in a checkout was made from its present sources: another extra needs no other."""
    sources = [Path(__file__), *(ROOT / "native").iterdir()]
    return TARGET.exists() and TARGET.stat().st_mtime > max(source.stat().st_mtime for source in sources)


def _compile(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    """An assembler may be older than AMX, whose instructions it does not know."""
    result = _run(command)
    return _run([*command, "-DWITHOUT_AMX"]) if result.returncode else result


def _run(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    words = list(map(str, command))
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:  # CXX names no program
        return subprocess.CompletedProcess(words, 127, "", f"{words[0]}: {error.strerror}")


class NativeLibrary(BuildHookInterface[Any]):
    """Runs for wheels and for editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        if version == "editable":
            if not _is_new():
                compile_library()
            return
        compile_library()
        build_data["force_include"][str(ROOT / "recipes")] = "camelid/recipes"  # found by name: see recipe.find
        if TARGET.exists():  # also one of an earlier build: it goes into the wheel
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"


def _platform() -> str:
    import sysconfig

    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


if __name__ == "__main__":
    sys.exit(0 if compile_library() else 1)
