"""Requests made up from our own description, good and bad: no answer is a fault of ours, or other than it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx

from camelid.generate.engine import Engine
from camelid.serve import app, openapi
from camelid.serve.auth import Keys

from .conftest import Running, serving

EXAMPLES = os.environ.get("CAMELID_EXAMPLES", "25")  # of each operation; by hand 1,000
KEY = "correct-horse-battery"


def test_the_description_is_openapi(running: Running, engine: Engine) -> None:
    described = httpx.get(f"{running.base}/openapi.json").json()
    assert described["openapi"].startswith("3.1")
    schemas = described["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["model"]["enum"] == ["tiny"]
    assert f'"exclusiveMaximum": {engine.config.vocab_size}' in str(schemas).replace("'", '"')


def test_every_route_is_described() -> None:
    assert set(app.POSTS) == set(openapi.POSTS)
    assert set(openapi.GETS) <= app.KNOWN


def test_made_up_requests(engine: Engine, tmp_path: Path) -> None:
    """Good requests may still be refused, for what a schema does not say (a prompt longer than the context, a choice
    that is not among the tools): that check is left out. All others are on."""
    (tmp_path / "keys").write_text(KEY)
    with serving(engine, Keys(tmp_path / "keys", "CAMELID_NO_KEY")) as server:
        done = schemathesis(server, tmp_path)
    assert done.returncode == 0, done.stdout[:6000] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) generated", done.stdout)[-1]) > 150
    assert "Tested: 9" in done.stdout
    assert "Stateful" in done.stdout
    assert engine.scheduler.pages.taken == 0


def schemathesis(server: Running, folder: Path) -> subprocess.CompletedProcess[str]:
    # one worker: with two its generators share state between threads, and five runs of twelve ended in its own error
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.base}/openapi.json", "-n", EXAMPLES, "--seed", "1",
        "-H", f"Authorization: Bearer {KEY}", "--exclude-checks", "positive_data_acceptance",
        "--no-color", "--continue-on-failure", "--generation-database", "none", "--workers", "1",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=3000, cwd=folder)
