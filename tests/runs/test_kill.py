"""A run that is stopped or killed and started again with the same command ends as one that never was."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxft.errors import ExitCode
from jaxft.training.log import TIMING_KEYS

STEPS = 40


def command(folder: Path) -> list[str]:
    """A smoke run long enough to be killed in: with dropout, accumulation and held-out losses on the way."""
    overrides = {
        "output_dir": folder, "train.steps": STEPS, "train.eval_every": 10, "train.log_every": 1,
        "train.accumulation_steps": 2, "checkpoint.every": 5, "adapter.dropout": 0.1, "eval.metric": None,
        "export.merged": False, "data.max_length": 400, "train.batch_size": 4,
    }  # fmt: skip
    return [
        sys.executable, "-m", "jaxft.cli", "train", "--config=configs/quickstart.py:smoke",
        *(f"--config.{key}={value}" for key, value in overrides.items()),
    ]  # fmt: skip


def start(folder: Path, cache: Path) -> subprocess.Popen:
    """The command as a process; compiled code is shared between the restarts."""
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    env.pop("XLA_FLAGS", None)
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        command(folder), cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(folder: Path, cache: Path) -> str:
    """Runs the command to its end."""
    process = start(folder, cache)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Returns when metrics.jsonl has reached a step, or the process has ended."""
    metrics = folder / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.02)


def figures(folder: Path) -> list[dict]:
    """metrics.jsonl without what a clock wrote."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMING_KEYS} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    cache = tmp_path_factory.mktemp("compiled")
    finish(folder, cache)
    return folder, cache


def assert_same(folder: Path, whole: Path) -> None:
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()
    assert figures(folder) == figures(whole)


def kill(folder: Path, cache: Path, chance: random.Random, steps: range) -> str:
    """Runs the command and kills it some time after a step of these; gives what it said."""
    process = start(folder, cache)
    wait_for_step(process, folder, chance.choice(steps))
    time.sleep(chance.random() * 0.3)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    return output


@pytest.mark.slow
def test_five_times_killed_run_ends_like_an_uninterrupted_one(uninterrupted, tmp_path):
    whole, cache = uninterrupted
    folder, chance = tmp_path / "run", random.Random(5)
    for first in range(1, STEPS, STEPS // 5):
        kill(folder, cache, chance, range(first, first + STEPS // 5))
    finish(folder, cache)
    assert_same(folder, whole)


def test_stopped_then_killed_run_ends_like_an_uninterrupted_one(uninterrupted, tmp_path):
    whole, cache = uninterrupted
    folder = tmp_path / "run"
    process = start(folder, cache)
    wait_for_step(process, folder, 3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == ExitCode.PREEMPTED, output
    assert "run the same command to go on" in output
    saved = max(int(step.name) for step in (folder / "checkpoints").iterdir() if step.name.isdigit())
    assert saved == figures(folder)[-1]["step"], "SIGTERM lost steps"
    assert f"going on from step {saved}" in kill(folder, cache, random.Random(1), range(saved + 1, STEPS))
    finish(folder, cache)
    assert_same(folder, whole)
