"""Damaged and hostile files of models: tens of thousands, each read or refused with a sentence, within limits.

The limits are those of `fuzz.limits`: memory, time for each input, no change outside the folder, no program and no
connection. The inputs are drawn from a fixed seed, so that a failure comes again; `fuzz.model_inputs` has both.
"""

import pytest
from fuzz.limits import run_limited

pytest.importorskip("hypothesis")
pytestmark = pytest.mark.slow

# How many inputs a function draws, and the least share that it must refuse: a change that nothing reads tests nothing.
INPUTS = {
    "safetensors": (12000, 0.5),
    "folders": (6000, 0.5),
    "configs": (12000, 0.5),
    "quantised_folders": (8000, 0.5),
    "gguf": (16000, 0.5),
    "peft_folders": (12000, 0.5),
    "tokenizers": (4000, 0.1),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_changed_files_are_read_or_refused(kind, tmp_path):
    number, least = INPUTS[kind]
    report = run_limited(f"fuzz.model_inputs:{kind}", tmp_path / kind, memory_mb=1536)
    assert report["tried"] >= number
    assert least * report["tried"] < report["refused"] < report["tried"]
