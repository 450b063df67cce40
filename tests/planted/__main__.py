"""Plant every fault of faults.toml, one at a time, in a copy of the project, and see which test notices.

python -m tests.planted [words of a fault's name …]: prints a table, exits 1 when a fault went unnoticed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CODE = ("camelid", "tests", "tools", "recipes", "docs", "native")  # and the files beside them


def faults() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tomllib.loads(Path(__file__).with_name("faults.toml").read_text("utf-8"))["fault"]
    return found


def noticed(fault: dict[str, Any], seconds: float = 1200) -> str | None:
    """The first test that fails with the fault, None when all pass. Tests that do not end in time noticed it too."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "project"
        copy.mkdir()
        for file in (path for path in ROOT.iterdir() if path.is_file()):
            shutil.copy(file, copy)
        for folder in CODE:
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
        cache = ROOT / ".cache"
        if cache.is_dir():
            (copy / ".cache").symlink_to(cache)
        file = copy / fault["file"]
        file.write_text(file.read_text("utf-8").replace(fault["old"], fault["new"]), "utf-8")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "--no-header",
            *fault["tests"].split(),
        ]
        environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment, timeout=seconds)
        except subprocess.TimeoutExpired:
            return "(the tests did not end)"
    if done.returncode == 0:
        return None
    first = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    if first is None and "rror" in done.stdout:  # the tests cannot even be collected
        return "(import)"
    if done.returncode not in (1, 2) or first is None:
        raise RuntimeError(f"{fault['name']}: the tests could not be run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return first[1]


def control(chosen: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Without a fault every test passes; how many seconds each set may take with one. Raises RuntimeError when a test
    fails: what it notices would mean nothing."""
    limits = {}
    for tests in sorted({fault["tests"] for fault in chosen}):
        begun = time.monotonic()
        plain = {"name": "nothing", "file": "README.md", "old": "", "new": "", "tests": tests}
        if failed := noticed(plain):
            raise RuntimeError(f"{failed} fails without any fault")
        limits[tests] = 30 + 5 * (time.monotonic() - begun)
    return limits


def main() -> None:
    words = sys.argv[1:]
    chosen = [f for f in faults() if all(word.lower() in f["name"].lower() for word in words)]
    limits = control(chosen)
    missed = 0
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2))) as pool:
        begun = time.monotonic()
        for fault, caught in zip(chosen, pool.map(noticed, chosen, [limits[f["tests"]] for f in chosen]), strict=True):
            missed += caught is None
            print(f"{'caught' if caught else 'MISSED':<7} {fault['name']:<70} {caught or ''}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught, {time.monotonic() - begun:.0f} s")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
