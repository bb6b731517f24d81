"""RunCheckpoints when things go wrong: full disks, SIGKILL, SIGTERM, several processes."""

import json
import os
import random
import signal
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from children import ended, run, until

from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.errors import CheckpointError


def test_a_failed_write_surfaces_at_the_next_call_and_names_step_and_folder(tmp_path):
    # A limit on file size stands in for a full disk: both fail in the background write.
    child = run("file_limit.py", tmp_path)
    message = json.loads(ended(child)[-1])
    assert f"step 2 was not saved to {tmp_path}" in message
    assert "step 1 is whole" in message
    with RunCheckpoints(tmp_path, keep=5) as checkpoints:
        assert checkpoints.all_steps() == (1,)
        assert os.listdir(tmp_path) == ["1"]


def test_the_old_step_outlives_a_new_one_whose_manifest_cannot_be_written(tmp_path, monkeypatch):
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    checkpoints.save(1, {"x": jnp.float32(1)}, {})
    checkpoints.wait()

    def full(folder, summing):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("jaxft.checkpoint.manifest.write", full)
        checkpoints.save(2, {"x": jnp.float32(2)}, {})
        with pytest.raises(CheckpointError, match=r"step 2 was not saved .*No space left.*step 1 is whole"):
            checkpoints.close()
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        assert os.listdir(tmp_path) == ["1"]
        assert checkpoints.restore({"x": jax.ShapeDtypeStruct((), jnp.float32)})[0]["x"] == 1


def kill_during_saves(folder, chance):
    child = run("save_forever.py", folder)
    until(child, "saving")
    time.sleep(chance.uniform(0, 0.4))
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL


def check_after_kill(folder, before):
    with RunCheckpoints(folder, keep=1) as checkpoints:
        names = os.listdir(folder)
        assert sorted(int(name) for name in names) == list(checkpoints.all_steps())  # nothing half remains
        found = checkpoints.restore({"x": jax.ShapeDtypeStruct((64, 64), jnp.float32)})
        if found is None:
            assert before is None
            return None
        state, extra = found
        assert extra["step"] == checkpoints.latest_step() >= (before or 0)
        np.testing.assert_array_equal(state["x"], np.full((64, 64), extra["step"], np.float32))
        return extra["step"]


def test_after_sigkill_the_newest_step_is_whole(tmp_path):
    chance, step = random.Random(1), None
    for _ in range(3):  # each run goes on where the last was killed
        kill_during_saves(tmp_path, chance)
        step = check_after_kill(tmp_path, step)
    assert step is not None


@pytest.mark.slow
def test_after_many_sigkills_the_newest_step_is_whole(tmp_path):
    chance, step = random.Random(2), None
    for _ in range(25):
        kill_during_saves(tmp_path, chance)
        step = check_after_kill(tmp_path, step)
    assert step is not None


@pytest.mark.parametrize(("first", "seconds"), [(1, 0), (1, 4), (500, 0), (500, 4)])
def test_sigterm_to_a_single_process_is_seen_and_saved(tmp_path, first, seconds):
    # JAX looks for the signal once a second: in four it has long acted when the first step ends.
    child = run("wait_for_sigterm.py", tmp_path, first, seconds)
    until(child, "stepping")
    child.send_signal(signal.SIGTERM)
    step = int(ended(child)[-1])
    assert step == first or not seconds
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest_step() == step


def test_two_processes_save_restore_and_leave_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=2"
    children = [run("two_processes.py", tmp_path, port, index, flags=flags) for index in range(2)]
    try:
        for child in children:
            until(child, "stepping")
        children[1].send_signal(signal.SIGTERM)
        lasts = {ended(child)[-1] for child in children}
    finally:
        for child in children:
            child.kill()
    assert len(lasts) == 1
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.all_steps() == (int(lasts.pop()),)
        (restored, _) = checkpoints.restore({"x": jax.ShapeDtypeStruct((8, 4), jnp.float32)})
    np.testing.assert_array_equal(restored["x"], np.arange(32).reshape(8, 4))
