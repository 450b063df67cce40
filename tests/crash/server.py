"""Runs camelid's command line again and again in children that are forked from one warm process, each with the shim
armed as asked: one JSON request a line in, one JSON answer a line out. Started with the shim preloaded."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from importlib import import_module
from typing import Any


def child(wish: dict[str, Any], shim: ctypes.CDLL) -> None:
    """Never returns: becomes the command."""
    for number, path in ((1, wish["stdout"]), (2, wish["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    import torch
    import torch._dynamo  # the plan's rehearsal needs it: here once, not in a copy for each command

    from camelid import cli

    torch.set_num_threads(1)
    if "root" in wish:
        shim.shim_arm(wish["root"].encode(), wish["at"], wish["fault"], wish["log"].encode())
    code = 70
    try:
        code = cli.run(wish["command"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        if "modules" in wish:
            with open(wish["modules"], "w", encoding="utf-8") as file:
                json.dump([name for name, module in sys.modules.items() if module is not None], file)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    for line in sys.stdin:
        wish = json.loads(line)
        for name in wish.get("import", []):
            try:
                import_module(name)
            except Exception:  # some names are no modules, or only for children
                continue
        status = 0
        if "command" in wish:
            pid = os.fork()
            if pid == 0:
                child(wish, shim)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps(status), flush=True)


if __name__ == "__main__":
    main()
