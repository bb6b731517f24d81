"""Configs and options: whatever they are, they make a run's config or are refused."""

import pytest

pytest.importorskip("hypothesis")

from fuzz.limits import run_limited  # after the check

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["files_of_configs", "arguments_of_commands"])
def test_configs_are_read_or_refused(name, tmp_path):
    report = run_limited(f"fuzz.config_inputs:{name}", tmp_path)
    assert report["tried"] >= 20_000 and 0 < report["refused"] < report["tried"]
