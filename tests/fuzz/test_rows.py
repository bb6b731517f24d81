"""Rows, their files and their names: whatever they are, they are trained on or refused."""

import pytest

pytest.importorskip("hypothesis")

from fuzz.limits import run_limited  # after the check

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["rows_of_every_format", "files_of_every_kind", "names_of_sources"])
def test_rows_are_read_or_refused(name, tmp_path):
    report = run_limited(f"fuzz.rows_inputs:{name}", tmp_path)
    assert report["tried"] >= 20_000
    assert 0 < report["refused"] < report["tried"] or name == "names_of_sources"
