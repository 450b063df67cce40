"""Outputs take their names in one step; what killed processes left is tidied, what live ones make is let alone."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from camelid import disk
from camelid.artifact import MANIFEST, damage, new_folder, write_manifest
from camelid.disk import make_folder, new_file, write_array
from camelid.errors import InputError

MAKE = """
import sys
from pathlib import Path
from camelid.artifact import new_folder
with new_folder(Path(sys.argv[1]), "test") as folder:
    (folder / "half").write_text("half")
    print(folder, flush=True)
    sys.stdin.read()
"""


def make(out: Path, content: str) -> None:
    with new_folder(out, "test") as folder:
        (folder / "content").write_text(content)
        write_manifest(folder, "test")


def begun(out: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that is making `out`, and its scratch folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAKE, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_goes_and_what_a_live_one_makes_stays(tmp_path: Path) -> None:
    (killed, left), (live, kept) = begun(tmp_path / "x"), begun(tmp_path / "x")
    other, others = begun(tmp_path / "x.b")  # begins like a scratch folder of x
    killed.kill()
    killed.wait()
    try:
        make(tmp_path / "x", "new")
        assert not left.exists()
        assert kept.exists()
        assert others.exists()
    finally:
        for process in (live, other):
            process.kill()
            process.wait()
    make(tmp_path / "x.b", "new")
    make(tmp_path / "x", "newer")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "x.b"]


def test_what_others_put_beside_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "x"
    make(out, "old")
    (out / "notes.md").write_text("mine")
    (out / "inner").mkdir()
    make(out / "inner" / "y", "another output")
    (out / "link").symlink_to("inner")
    make(out, "new")

    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    make(out, "newer")
    assert (out / "content").read_text() == "newer"
    assert (out / "notes.md").read_text() == "mine"
    assert (out / "link" / "y" / "content").read_text() == "another output"
    assert damage(out / "inner" / "y") is None
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_several_threads_make_one_output(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: make(tmp_path / "x", str(n)), range(20)))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / MANIFEST).exists()


def test_through_a_link_and_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "big" / "x")
    for content in ("one", "two"):
        make(tmp_path / "x", content)
        assert (tmp_path / "big" / "x" / "content").read_text() == content
        assert (tmp_path / "x").is_symlink()
    assert new_file(tmp_path / "y", [b"1"])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make(Path("."), "here")
    assert (tmp_path / "here" / "content").read_text() == "here"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big", "here", "x", "y"]


def test_what_cannot_be_taken_along_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "x", "old")
    (tmp_path / "x" / "theirs").write_text("closed")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, *more, **how: Path(path).name != "theirs" and access(path, *more))
    with pytest.raises(InputError, match=r"x/theirs is not camelid's and cannot be read"):
        make(tmp_path / "x", "new")
    assert (tmp_path / "x" / "content").read_text() == "old"


def test_without_an_exchange_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on other systems: should the process end between the two renames, the next run puts back what was there."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    make(tmp_path / "x", "old")
    make(tmp_path / "x", "new")
    assert (tmp_path / "x" / "content").read_text() == "new"
    rename = os.rename

    def dying(source: Path, target: Path) -> None:
        if target == tmp_path / "x":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", dying)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "x", "newer")
    monkeypatch.setattr(os, "rename", rename)
    assert not (tmp_path / "x").exists()
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "x", "test"):
        raise ZeroDivisionError
    assert (tmp_path / "x" / "content").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_lock", lambda descriptor: None)
    make(tmp_path / "x", "old")
    (tmp_path / ".x.1-00000000.making").mkdir()  # perhaps somebody's
    make(tmp_path / "x", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x.1-00000000.making", "x"]


@pytest.mark.parametrize(
    "array", [np.arange(6, dtype="<u2").reshape(2, 3), np.empty((0, 2), np.int64), np.ones(3)[::2]]
)
def test_arrays_are_numpys(tmp_path: Path, array: np.ndarray) -> None:
    write_array(tmp_path / "a.npy", array)
    found = np.load(tmp_path / "a.npy")
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert bool((found == array).all())


def test_folders_above_are_made(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b" / "c")
    make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.EIO])
def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Some shared file systems have no way to; a disk that fails is another matter."""
    sync = os.fsync

    def refusing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            new_file(tmp_path / "out", [b"content"])
    else:
        new_file(tmp_path / "out", [b"content"])
        assert (tmp_path / "out").read_bytes() == b"content"


def test_a_files_name_outlasts_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is on the disk when its folder is settled after it was given."""
    seen: list[tuple[Path, bool]] = []
    settle = disk.settle
    monkeypatch.setattr(disk, "settle", lambda path: (seen.append((path, (tmp_path / "out").exists())), settle(path)))
    new_file(tmp_path / "out", [b"content"])
    assert seen[-1] == (tmp_path.resolve(), True)
