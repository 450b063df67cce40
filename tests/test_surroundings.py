"""The same bits wherever a command runs: optimised Python, other hash seeds, a locale without Chinese, no home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .life import VERBS, words

STEPS = ("corpus", "tokenizer", "tokens", "pretrain", "finetune", "merge", "quantize", "convert-meta", "evaluate")
LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # text files are then ASCII by default
SURROUNDINGS: dict[str, tuple[list[str], dict[str, str]]] = {
    "optimised": (["-OO"], {}),
    "hash seed 0": ([], {"PYTHONHASHSEED": "0"}),
    "hash seed 4711": ([], {"PYTHONHASHSEED": "4711"}),
    "a locale without Chinese": ([], LOCALE),
    "no home and no cache": ([], {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none"}),
    "two threads for text": ([], {"OMP_NUM_THREADS": "2"}),
}
SCRIPT = """
import json, sys
from camelid import cli
for command in json.load(sys.stdin):
    if code := cli.run(command):
        sys.exit(code)
"""


def lived(life: Path, out: Path, options: list[str], variables: dict[str, str]) -> dict[str, str]:
    """Digests of what the steps make, by file, without pages and what holds times."""
    out.mkdir()
    environment = {**os.environ, **variables, "TMPDIR": str(out)}
    done = subprocess.run(
        [sys.executable, *options, "-c", SCRIPT], input=json.dumps([words(name, out / name, life) for name in STEPS]),
        capture_output=True, text=True, encoding="utf-8", errors="replace", env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    digests = {}
    for manifest in sorted(out.rglob("camelid.json")):
        files: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        place = manifest.parent.relative_to(out)
        digests |= {f"{place}/{n}": d for n, d in files.items() if Path(n).name not in ("report.html", "README.md")}
    return digests


@pytest.fixture(scope="module")
def plain(life: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return lived(life, tmp_path_factory.mktemp("plain") / "out", [], {})


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_the_same_bits(name: str, life: Path, plain: dict[str, str], tmp_path: Path) -> None:
    assert set(STEPS) <= set(VERBS)
    assert len(plain) > 30
    assert lived(life, tmp_path / "out", *SURROUNDINGS[name]) == plain
