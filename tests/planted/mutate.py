"""How much of the code the tests hold: small random changes, one at a time, and whether a test notices.

python -m tests.planted.mutate [NAME …] [--each N] [--seed S]: for each room of ROOMS, N changes at random. Prints
the score of each room and every change that no test noticed; some of those change nothing that can be seen.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .__main__ import ROOT, control, noticed

ROOMS = {
    "loaders": (
        ["formats/hf.py", "formats/gguf_file.py", "formats/gguf.py", "formats/pickle_reader.py"],
        "tests/formats tests/fuzz",
    ),
    "limits": (["serve/limits.py"], "tests/serve/test_bad_bodies.py tests/serve/test_load.py"),
    "auth": (["serve/auth.py"], "tests/serve/test_auth.py tests/serve/test_process.py tests/serve/test_page.py"),
    "checkpoint": (
        ["train/checkpoint.py", "artifact.py", "disk.py"],
        "tests/test_disk.py tests/train/test_checkpoint.py tests/train/test_crashes.py tests/train/test_train.py "
        "tests/train/test_parallel.py tests/cli tests/test_reproduce.py tests/formats/test_hf.py tests/crash",
    ),
    "order": (["tokens/order.py", "tokens/loader.py", "tokens/pack.py"], "tests/tokens"),
    "masks": (
        ["finetune/conversation.py", "tokens/batch.py"],
        "tests/finetune/test_conversation.py tests/tokens tests/train/test_train.py",
    ),
}
SWAPPED: dict[type[ast.AST], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.In: "not in",
    ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is", ast.Add: "-", ast.Sub: "+", ast.Mult: "//", ast.FloorDiv: "*",
}  # fmt: skip


def changes(source: str) -> Iterator[tuple[ast.AST, str]]:
    """(node, what to write in its place) of every change that can be made."""

    def text(node: ast.AST) -> str:
        return ast.get_source_segment(source, node) or ""

    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in SWAPPED:
                yield node, f"({text(left)} {SWAPPED[type(op)]} {text(right)})"
            case ast.BoolOp(op=op, values=values):
                other = " or " if isinstance(op, ast.And) else " and "
                yield node, f"({other.join(f'({text(value)})' for value in values)})"
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield node, f"({text(operand)})"
            case ast.BinOp(left=left, op=op, right=right) if type(op) in SWAPPED:
                if not any(
                    isinstance(side, ast.Constant | ast.JoinedStr) and not _number(side) for side in (left, right)
                ):
                    yield node, f"({text(left)} {SWAPPED[type(op)]} {text(right)})"
            case ast.Constant(value=bool() as value):
                yield node, str(not value)
            case ast.Constant(value=int() as value):
                yield node, str(value + 1)
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
                yield test, f"(not ({text(test)}))"
            case ast.Raise():
                yield node, "pass"
            case ast.Expr(value=ast.Call()):
                yield node, "pass"


def _number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


def faults(name: str, each: int, seed: int) -> list[dict[str, Any]]:
    """`each` changes of a room, as faults of a whole file."""
    files, tests = ROOMS[name]
    found = []
    for file in files:
        source = (ROOT / "camelid" / file).read_text(encoding="utf-8")
        starts = [0]
        for line in source.encode().splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        for node, new in changes(source):
            assert isinstance(node, ast.expr | ast.stmt)
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            changed = (source.encode()[:begin] + new.encode() + source.encode()[end:]).decode()
            told = f"{file}:{node.lineno}: {' '.join(source.encode()[begin:end].decode().split())[:60]} -> {new[:60]}"
            found.append({"name": told, "file": f"camelid/{file}", "old": source, "new": changed, "tests": tests})
    return random.Random(f"{seed} {name}").sample(found, min(each, len(found)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", choices=[[], *ROOMS], metavar="NAME")
    parser.add_argument("--each", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name in options.names or ROOMS:
            chosen = faults(name, options.each, options.seed)
            limits = control(chosen)
            caught = list(pool.map(noticed, chosen, [limits[f["tests"]] for f in chosen]))
            for fault, test in zip(chosen, caught, strict=True):
                if test is None:
                    print(f"  lives  {fault['name']}", flush=True)
            score = sum(test is not None for test in caught) / len(chosen)
            print(f"{name}: {score:.0%} of {len(chosen)} changes noticed", flush=True)


if __name__ == "__main__":
    main()
