"""Every verb that writes, on a disk that fails at each of its file operations: whatever was finished before is still
there and whole, nothing half-made passes for finished, and the same command then makes the same files."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .bench import FAULTS, KILLED, Server, Verb, content, copied, cut_the_power, files, whole

EARLIER = "{{inputs}}/{}/checkpoints/step-00000002"
LEARNED = "*.safetensors state/*"
VERBS = {
    "corpus": Verb("corpus", "*.parquet", ("{inputs}/text", "{inputs}/text/0.txt")),
    "tokenizer": Verb("tokenizer", "tokenizer.json vocab.tsv", ("400", "390")),
    "tokens": Verb("tokens", "*.bin *.npy", ("{inputs}/corpus", "{inputs}/other")),
    "pretrain": Verb("pretrain", LEARNED, resume=True),
    "finetune": Verb("finetune", LEARNED, resume=True),
    "merge": Verb("merge", "*.safetensors", ("{inputs}/adapter", EARLIER.format("finetune"))),
    "quantize": Verb("quantize", "*.safetensors", ("int8", "int4")),
    "convert-hf": Verb("convert-hf", "*.safetensors", ("{inputs}/model", EARLIER.format("pretrain"))),
    "convert-meta": Verb("convert-meta", "*.pth params.json", ("{inputs}/model", EARLIER.format("pretrain"))),
    "convert-gguf": Verb("convert-gguf", "", folder=False),
    "evaluate": Verb("evaluate", "result.json", ("text/0.txt", "text/1.txt")),
}


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler to make the failing disk with")
    made = tmp_path_factory.mktemp("shim") / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(Path(__file__).with_name("shim.c")), "-ldl"]
    subprocess.run([*command, "-lpthread"], check=True)
    return made


@pytest.fixture(scope="session")
def server(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(shim, tmp_path_factory.mktemp("server") / "scratch")
    yield server
    server.close()


def spread(operations: int, fault: str, every: bool) -> list[int]:
    """All of them, or a few that differ from fault to fault."""
    stride = 1 if every else max(1, operations // 4)
    return list(range(1 + FAULTS.index(fault) * stride // len(FAULTS), operations + 1, stride))


@pytest.mark.parametrize("name", VERBS)
def test_some_file_operations_fail(name: str, server: Server, life: Path, tmp_path: Path) -> None:
    fail(VERBS[name], server, life, tmp_path, every=False)


@pytest.mark.nightly
@pytest.mark.parametrize("name", VERBS)
def test_every_file_operation_fails(name: str, server: Server, life: Path, tmp_path: Path) -> None:
    print(name, fail(VERBS[name], server, life, tmp_path, every=True))


def fail(verb: Verb, server: Server, life: Path, tmp_path: Path, every: bool) -> str:
    root, before = tmp_path / "root", tmp_path / "before"
    out = root / "out"
    root.mkdir()
    server.warm(verb.words(tmp_path / "warm", life))
    if verb.older is not None:
        assert server.run(verb.words(out, life, older=True), root).code == 0
    older = content(verb, out)
    copied(root, before)
    settled = files(root)
    good = server.run(verb.words(out, life), root)
    assert good.code == 0, good.err
    wanted, names = content(verb, out), sorted(p.name for p in root.iterdir())
    assert wanted is not None
    assert wanted != older
    assert len(good.log) > 5
    for fault in FAULTS:
        for at in spread(len(good.log), fault, every):
            copied(before, root)
            ended = server.run(verb.words(out, life), root, at, fault)
            where = f"{fault} at {at} of {len(good.log)}: {good.log[at - 1]}, exit {ended.code}: {ended.err[-2000:]}"
            if fault in ("die", "half", "power", "blank"):
                assert ended.code == KILLED, where
            else:
                assert ended.code in (0, 1), where
                assert "Traceback" not in ended.err, where
            if fault in ("power", "blank"):
                cut_the_power(root, ended.log, settled, names=fault == "power")
            left = content(verb, out)
            if fault in ("ENOSPC", "EIO") and ended.code == 0:
                assert left == wanted, where
            if verb.resume:
                assert left is None or whole(verb, out) is None, where
            else:
                assert left in (older, wanted), where
                assert whole(verb, out) is None, where
            if left == wanted and not verb.folder:
                continue  # a finished file is not written over
            again = server.run(verb.words(out, life), root)
            assert again.code == 0, f"{where}\nand then: {again.err[-3000:]}"
            assert content(verb, out) == wanted, where
            assert sorted(p.name for p in root.iterdir()) == names, where
    return f"{len(good.log)} operations, {len(FAULTS)} faults"
