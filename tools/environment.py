"""Make the virtual environment that the Makefile's targets run in: `environment.py VENV EXTRA`.

Standard library only, so it runs on a bare Python. The one thing that needs care is torch: on Linux the
package index's default build brings gigabytes of CUDA. Without a GPU we take a CPU build: the one pip already
has at hand (a local wheel, a mirror), else the one from PyTorch's own index.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

TORCH = "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)


def default_build_is_cpu(python: Path) -> bool:
    """Ask pip, without downloading the wheel, whether the torch it would choose is a CPU build."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    done = subprocess.run([*command, "--report", "-", TORCH], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return False
    chosen = json.loads(done.stdout)["install"][0]["metadata"]
    needs_cuda = any(need.startswith(("nvidia-", "cuda-")) for need in chosen.get("requires_dist", []))
    return "+cpu" in chosen["version"] or not needs_cuda


def install_torch(python: Path) -> None:
    has_gpu = shutil.which("nvidia-smi") is not None
    cuda_is_default = platform.system() == "Linux"
    if has_gpu or not cuda_is_default or default_build_is_cpu(python):
        run(python, "-m", "pip", "install", "--quiet", TORCH)
    else:
        run(python, "-m", "pip", "install", "--quiet", TORCH, "--index-url", TORCH_CPU_INDEX)


def main() -> None:
    venv, extra = Path(sys.argv[1]), sys.argv[2]
    if sys.version_info < (3, 11):  # noqa: UP036 (this file runs before pip can check)
        sys.exit(f"camelid needs Python 3.11 or newer, not {platform.python_version()}: try PYTHON=python3.12")
    python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
    started = time.monotonic()
    print(f"preparing {venv} (once, one to three minutes)", file=sys.stderr)
    if not python.exists():
        run(sys.executable, "-m", "venv", venv)
    install_torch(python)
    run(python, "-m", "pip", "install", "--quiet", "--editable", f".[{extra}]")
    (venv / f".ready-{extra}").touch()
    print(f"{venv} is ready after {time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
