"""Readers of a run that is running: a step that it deletes meanwhile is no error of theirs."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.errors import CheckpointError, ConfigError
from jaxft.runs.export import READS, read_step


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run folder with a step whose weight is its number."""
    folder = tmp_path_factory.mktemp("run")
    with RunCheckpoints(folder / "checkpoints", keep=9) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"w": jnp.full(4, step, jnp.float32)}, {"step": step})
            checkpoints.wait()
    return folder


@pytest.fixture
def run(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    shutil.move(tmp_path / "run" / "checkpoints" / "2", tmp_path / "2")
    return tmp_path / "run"


def weight(checkpoints: RunCheckpoints, step: int) -> float:
    state, _ = checkpoints.restore({"w": jnp.zeros(4, jnp.float32)}, step)
    return float(np.asarray(state["w"])[0])


def test_a_step_that_vanishes_is_read_again_as_the_newest(run):
    read = []

    def slowly(checkpoints, step):
        if not read:  # the run saves step 2 and deletes step 1
            shutil.move(run.parent / "2", run / "checkpoints" / "2")
            shutil.rmtree(run / "checkpoints" / "1")
        read.append(step)
        return weight(checkpoints, step)

    assert read_step(run, None, slowly) == 2 and read == [1, 2]
    read.clear()
    (run / "checkpoints" / "2").rename(run.parent / "2")
    with pytest.raises(ConfigError, match="has no whole checkpoint yet"):
        read_step(run, None, slowly)


def test_a_step_that_was_asked_for_is_not_replaced_by_another(run):
    def slowly(checkpoints, step):
        shutil.move(run.parent / "2", run / "checkpoints" / "2")
        shutil.rmtree(run / "checkpoints" / "1")
        return weight(checkpoints, step)

    with pytest.raises(ConfigError, match=r"step 1 of .* was deleted while it was read.*\[2\] now: name one of them"):
        read_step(run, 1, slowly)


def test_an_error_of_a_step_that_is_there_is_raised_at_once(run):
    calls = []

    def failing(checkpoints, step):
        calls.append(step)
        raise ValueError("of the reader")

    with pytest.raises(ValueError, match="of the reader"):
        read_step(run, None, failing)
    assert calls == [1]
    with pytest.raises(CheckpointError, match=r"has no whole step 7; it has \[1\]"):
        read_step(run, 7, weight)


def test_there_is_an_end(run):
    def overtaken(checkpoints, step):
        (run / "checkpoints" / str(step)).rename(run / "checkpoints" / str(step + 1))
        raise FileNotFoundError(step)

    with pytest.raises(CheckpointError, match=f"{READS} steps of .* in a row were deleted.*Wait until it ends"):
        read_step(run, None, overtaken)


def test_the_exported_step_comes_first(run):
    shutil.move(run.parent / "2", run / "checkpoints" / "2")
    assert read_step(run, None, weight, preferred=1) == 1
    assert read_step(run, None, weight, preferred=7) == 2 and read_step(run, None, weight) == 2
