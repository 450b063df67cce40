"""The benchmark tables are their files' figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tables_say_what_the_files_say() -> None:
    words = [sys.executable, str(ROOT / "tools" / "bench_readme.py"), "--check"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "bench" / "README.md").read_text(encoding="utf-8").count("| camelid |") >= 6
