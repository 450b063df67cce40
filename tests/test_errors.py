"""Errors that cross from one process into another stay what they are."""

from __future__ import annotations

import copy

import pytest

from camelid.errors import CamelidError, ChecksFailed, MissingExtra


@pytest.mark.parametrize(
    "error", [MissingExtra("pyarrow", "data", "reading parquet"), ChecksFailed("two failed", {"checks": []})]
)
def test_an_error_comes_whole_out_of_a_worker(error: CamelidError) -> None:
    again = copy.copy(error)  # by the same way as pickle
    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))
