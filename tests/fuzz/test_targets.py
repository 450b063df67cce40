"""What searches found (`guided`) stays mended, and each reader takes what they began from."""

from __future__ import annotations

from pathlib import Path

import pytest

from .seeds import seeds
from .targets import TARGETS, taken

FOUND = sorted((Path(__file__).parent / "found").glob("*/*"))


@pytest.fixture(scope="session")
def sound() -> dict[str, list[bytes]]:
    return seeds()


@pytest.mark.parametrize("name", TARGETS)
def test_sound_bytes_are_taken_and_cut_ones_never_surprise(
    sound: dict[str, list[bytes]], name: str, tmp_path: Path
) -> None:
    for data in sound[name]:
        assert taken(TARGETS[name], data, tmp_path)
        for size in range(0, len(data), 1 + len(data) // 16):
            taken(TARGETS[name], data[:size], tmp_path)


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found(path: Path, tmp_path: Path) -> None:
    taken(TARGETS[path.parent.name], path.read_bytes(), tmp_path)
