"""The planted faults still fit the code; planting them (`python -m tests.planted`) is for by hand: it takes minutes."""

from __future__ import annotations

from typing import Any

import pytest

from .__main__ import ROOT, faults

FAULTS = faults()


@pytest.mark.parametrize("fault", FAULTS, ids=[fault["name"] for fault in FAULTS])
def test_it_can_be_planted(fault: dict[str, Any]) -> None:
    source = (ROOT / fault["file"]).read_text(encoding="utf-8")
    assert source.count(fault["old"]) == 1
    changed = source.replace(fault["old"], fault["new"])
    compile(changed, fault["file"], "exec")
    assert changed != source
    assert all((ROOT / path).exists() for path in fault["tests"].split())


def test_there_are_enough() -> None:
    assert len(FAULTS) == 80  # as README says
    assert len({fault["name"] for fault in FAULTS}) == len(FAULTS)
