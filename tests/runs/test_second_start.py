"""A command that is given again, in a new process, compiles nothing that an earlier one has compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import collections, json, sys
import jax
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event.rpartition("/")[2]]))
import jaxft
settings = {"eval.metric": None, "export.merged": False, "output_dir": sys.argv[1]}
jaxft.train(jaxft.get_config("configs/quickstart.py:smoke", settings))
print(json.dumps(seen))
"""


def start(folder: Path, **variables: str) -> dict[str, int]:
    """Trains in a new process: how often JAX asked its cache, and what came of it."""
    variables = {"XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[2])} | variables
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)],
        env=os.environ | variables,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_it_compiles_nothing_and_what_was_cut_off_alone(tmp_path):
    variables = {"JAXFT_CACHE": str(tmp_path / "cache")}
    first = start(tmp_path / "one", **variables)
    entries = sorted((tmp_path / "cache" / "compiled").glob("*/*-cache"), key=lambda path: path.stat().st_size)
    assert first["cache_misses"] == len(entries) > 10
    largest = entries[-1]
    content = largest.read_bytes()
    largest.write_bytes(content[: len(content) // 2])
    second = start(tmp_path / "two", **variables)
    assert second["cache_misses"] == 1 and largest.stat().st_size > len(content) // 2
    assert second["cache_hits"] == second["compile_requests_use_cache"] - 1
    assert second["compile_requests_use_cache"] == first["compile_requests_use_cache"]
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "one" / weights).read_bytes() == (tmp_path / "two" / weights).read_bytes()
