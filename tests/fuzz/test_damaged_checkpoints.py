"""Damaged steps of runs and Orbax models: thousands, each read or refused with a sentence, within limits."""

import pytest
from fuzz.limits import run_limited

pytest.importorskip("hypothesis")
pytestmark = pytest.mark.slow

INPUTS = {"run_steps": 3000, "orbax_folders": 6000}


@pytest.mark.parametrize("kind", INPUTS)
def test_damaged_checkpoints_are_read_or_refused(kind, tmp_path):
    report = run_limited(f"fuzz.checkpoint_inputs:{kind}", tmp_path / kind, memory_mb=1536)
    assert report["tried"] >= INPUTS[kind]
    assert 0.5 * report["tried"] < report["refused"] < report["tried"]
