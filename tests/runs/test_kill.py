"""A run that is stopped or killed and started again with the same command ends as one that never was."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from heard_signals import HEARING

from jaxft.assets import ASSETS
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


def start(folder: Path, cache: Path, more: Sequence[str] = (), before: Sequence[str] = ()) -> subprocess.Popen:
    """The command as a process; compiled code is shared between the restarts, and kills cut entries of it off.

    more: further arguments. before: a command that runs it.
    """
    env = os.environ | {"JAXFT_CACHE": str(cache)}
    env.pop("XLA_FLAGS", None)
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [*HEARING, *before, *command(folder), *more],
        cwd=root,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(folder: Path, cache: Path, more: Sequence[str] = ()) -> str:
    """Runs the command to its end."""
    process = start(folder, cache, more)
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


def kill(folder: Path, cache: Path, chance: random.Random, steps: range, more: Sequence[str] = ()) -> str:
    """Runs the command and kills it some time after a step of these; gives what it said."""
    process = start(folder, cache, more)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_stopped_then_killed_run_ends_like_an_uninterrupted_one(uninterrupted, tmp_path, name):
    whole, cache = uninterrupted
    folder = tmp_path / "run"
    process = start(folder, cache)
    wait_for_step(process, folder, 3)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == ExitCode.PREEMPTED, output
    assert "run the same command to go on" in output
    saved = max(int(step.name) for step in (folder / "checkpoints").iterdir() if step.name.isdigit())
    assert saved == figures(folder)[-1]["step"], "SIGTERM lost steps"
    assert f"going on from step {saved}" in kill(folder, cache, random.Random(1), range(saved + 1, STEPS))
    finish(folder, cache)
    assert_same(folder, whole)


@pytest.mark.slow
def test_a_signal_after_the_last_step_is_answered_before_scores_and_exports(uninterrupted, tmp_path):
    whole, cache = uninterrupted
    for attempt in range(4):
        folder = tmp_path / f"run-{attempt}"
        process = start(folder, cache)
        wait_for_step(process, folder, STEPS)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=300)
        if process.returncode or "read back by" not in output:
            break  # else the signal came too late: the exports had begun
    assert process.returncode == ExitCode.PREEMPTED, output
    assert f"after step {STEPS}, which is saved" in output and not (folder / "summary.json").exists()
    finish(folder, cache)
    assert_same(folder, whole)


@pytest.mark.slow
def test_nohup_ignores_a_closed_terminal(uninterrupted, tmp_path):
    whole, cache = uninterrupted
    process = start(tmp_path / "run", cache, before=["nohup"])
    wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_machine_that_slept_for_longer_than_a_heartbeat_goes_on(uninterrupted, tmp_path):
    whole, cache = uninterrupted
    process = start(tmp_path / "run", cache)
    wait_for_step(process, tmp_path / "run", 5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(115)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert_same(tmp_path / "run", whole)


SMOKE = ASSETS / "smoke"
PAIRS = {"data.train": SMOKE / "pairs.jsonl", "data.eval": SMOKE / "pairs_heldout.jsonl"}
LABELS = {"data.train": SMOKE / "labelled.jsonl", "data.eval": SMOKE / "labelled_heldout.jsonl"}
TEACHER = {
    "method.distill.teacher": SMOKE, "method.distill.teacher_random_init": True, "method.distill.cache_top_k": 8,
    "data.limit": "None",
}  # fmt: skip
# Every rollout is trained on twice, so that a run may be killed in the middle of one.
ANSWERS = {
    "data.train": SMOKE / "prompts.jsonl", "data.eval": SMOKE / "prompts_heldout.jsonl", "rollout.num_iterations": 2,
    "rollout.num_generations": 4, "rollout.max_completion_length": 12, "checkpoint.every": 6,
    "rewards.functions": f"{Path(__file__).parents[1] / 'rollouts' / 'reward_cases.py'}:odd", "rewards.workers": 1,
    "data.max_length": 400, "train.batch_size": 8,
}  # fmt: skip
METHODS = {
    "grpo": ANSWERS,
    "ppo": ANSWERS | {"method.ppo.kl_target": 1.0, "method.ppo.kl_horizon": 100},
    "dpo": PAIRS,
    "reward": PAIRS | {"adapter.dropout": 0.1},
    "kto": LABELS | {"method.kto.reference": "cached"},
    "distill": TEACHER,
}


def arguments(method: str) -> list[str]:
    """What makes the command a run of another method. A reference must be the policy at the start: no dropout."""
    overrides = {"method.name": method, "adapter.dropout": 0.0, "train.steps": 80, **METHODS[method]}
    return [f"--config.{key}={value}" for key, value in overrides.items()]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_of_another_method_ends_like_an_uninterrupted_one(method, tmp_path):
    whole, folder, cache, more = tmp_path / "whole", tmp_path / "run", tmp_path / "compiled", arguments(method)
    finish(whole, cache, more)
    assert "going on from" not in kill(folder, cache, random.Random(2), range(20, 26), more)
    # Which checkpoint was whole when the process died depends on the machine.
    assert re.search(r"going on from step \d+ of 80", finish(folder, cache, more))
    assert_same(folder, whole)
    if method in ("grpo", "ppo"):
        assert (folder / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()


@pytest.mark.slow
def test_a_run_that_is_stopped_in_the_middle_of_a_rollout_first_takes_its_other_steps(tmp_path):
    whole, folder, cache, more = tmp_path / "whole", tmp_path / "run", tmp_path / "compiled", arguments("grpo")
    finish(whole, cache, more)
    process = start(folder, cache, more)
    wait_for_step(process, folder, 7)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == ExitCode.PREEMPTED, output
    saved = max(int(step.name) for step in (folder / "checkpoints").iterdir() if step.name.isdigit())
    assert saved == figures(folder)[-1]["step"] and saved % 2 == 0
    assert f"going on from step {saved} of 80" in finish(folder, cache, more)
    assert_same(folder, whole)
    assert (folder / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_caches_a_teacher_starts_the_cache_again(tmp_path):
    whole, folder, cache, more = tmp_path / "whole", tmp_path / "run", tmp_path / "compiled", arguments("distill")
    finish(whole, cache, more)
    process = start(folder, cache, more)
    while not list((folder / "teacher").glob("*.partial")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "checkpoints" / "5").exists() and list((folder / "teacher").glob("*.partial"))
    finish(folder, cache, more)
    assert_same(folder, whole)
    assert not list((folder / "teacher").glob("*.partial"))
    for name in ("ids.npy", "logps.npy"):
        ours, theirs = (sorted(run.glob(f"teacher/*/{name}")) for run in (folder, whole))
        assert len(ours) == 2 and sorted(p.read_bytes() for p in ours) == sorted(p.read_bytes() for p in theirs)


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_caches_a_reference_starts_the_cache_again(tmp_path):
    whole, folder, cache, more = tmp_path / "whole", tmp_path / "run", tmp_path / "compiled", arguments("kto")
    finish(whole, cache, more)
    process = start(folder, cache, more)
    while "reference log-probabilities" not in (line := process.stdout.readline()):
        assert line, "the run ended without a cache"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "reference.npz").exists() and not (folder / "checkpoints" / "5").exists()
    finish(folder, cache, more)
    assert_same(folder, whole)
