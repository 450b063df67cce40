"""Processes that begin anew without glibc's small caches."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
from typing import Any

import pytest

from camelid.kernels.crumbs import NONE_KEPT, TUNABLES, none_kept

glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="this C library is not glibc",
)

# A block that is freed into the cache still counts as used.
SCRIPT = """
import ctypes, json, os, sys
from camelid.kernels.crumbs import begin_without, none_kept
begin_without()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype = Info, ctypes.c_void_p
block, beyond = libc.malloc(1000), libc.malloc(1000)
before = libc.mallinfo2().h
libc.free(ctypes.c_void_p(block))
told = {"joined": before - libc.mallinfo2().h >= 900, "none_kept": none_kept(), "argv": sys.argv[1:],
        "pid": os.getpid(), "tunables": os.environ.get("GLIBC_TUNABLES"), "dev": sys.flags.dev_mode}
print(json.dumps(told))
sys.exit(7)
"""


def begun(tunables: str | None) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES}
    if tunables is not None:
        environment[TUNABLES] = tunables
    command = [sys.executable, "-X", "dev", "-c", SCRIPT, "a b", "--c=é"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        found: dict[str, Any] = json.loads(process.communicate()[0])
    assert process.returncode == 7
    assert found.pop("pid") == process.pid
    assert found.pop("argv") == ["a b", "--c=é"]
    assert found.pop("dev")
    return found


@glibc
@pytest.mark.parametrize("told", [None, "", "glibc.malloc.check=0"])
def test_a_process_begins_anew_as_it_was(told: str | None) -> None:
    found = begun(told)
    expected = f"{told}:{NONE_KEPT}" if told else NONE_KEPT
    assert found == {"joined": True, "none_kept": True, "tunables": expected}


@glibc
@pytest.mark.parametrize(("told", "none"), [("glibc.malloc.tcache_count=7", False), (NONE_KEPT, True)])
def test_what_glibc_was_told_stays(told: str, none: bool) -> None:
    found = begun(told)
    assert found == {"joined": none, "none_kept": none, "tunables": told}


def test_other_c_libraries_have_no_such_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setenv(TUNABLES, NONE_KEPT)
    assert not none_kept()


@glibc
def test_who_is_not_heard_begins_once() -> None:
    """glibc takes the setting away from a program that is set-group-ID: that is no reason to begin for ever."""
    script = (
        "import os\nfrom camelid.kernels import crumbs\nprint('begun', flush=True)\n"
        "os.environ.pop(crumbs.TUNABLES, None)\ncrumbs.begin_without()\nprint(crumbs.BEGUN in os.environ)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "begun\nbegun\nFalse\n"


@glibc
def test_a_script_from_stdin_goes_on() -> None:
    script = "from camelid.kernels.crumbs import begin_without, none_kept\nbegin_without()\nprint(none_kept())"
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES}
    done = subprocess.run(
        [sys.executable, "-"], input=script, capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "False\n"


@glibc
@pytest.mark.parametrize(
    ("verb", "anew", "code"), [("plan", True, 0), ("finetune", True, 0), ("merge", False, 2), ("--version", False, 0)]
)
def test_verbs_that_train_begin_anew(verb: str, anew: bool, code: int) -> None:
    script = (
        "import os, sys\n"
        "os.execve = lambda path, words, environment: (print('anew', *words[-2:]), sys.exit(0))\n"
        "from camelid.cli import main\nmain()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES}
    done = subprocess.run(
        [sys.executable, "-c", script, verb, "nothing"], capture_output=True, text=True, check=False, env=environment
    )
    assert (done.stdout == f"anew {verb} nothing\n", done.returncode) == (anew, code)
