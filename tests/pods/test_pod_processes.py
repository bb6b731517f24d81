"""`jaxft pod run` with real processes: folders play two hosts, on which real `jaxft train` processes run."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from stub_pod import lead_in, slices_in
from stub_slices import AFTER, BEFORE, MIDDLE

from jaxft.pods.slices import Phase, State

STEPS = ("mkdir", "sha256sum", "copy", "tar", "setup.sh", "state.sh", "jaxft", "start.sh", "upload_logs.sh", "log.sh")


@pytest.fixture
def port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def weights(folder):
    return load_file(folder / "to" / "run" / "adapter" / "adapter_model.safetensors")


def launch_of(folder):
    return json.loads((folder / "home" / ".jaxft" / "pods" / "run-1" / "launch.json").read_text())


def check_end(folder, slices, summary):
    assert summary["state"] == "done" and summary["step"] == 4
    assert not slices.alive and slices.events[-1] == "delete"
    assert not [pid for worker in slices._all() for pid in slices.processes(worker)]
    assert (folder / "to" / "launch.json").read_text() == (
        folder / "home" / ".jaxft" / "pods" / "run-1" / "launch.json"
    ).read_text()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The adapter of a run without any fault."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "home").mkdir()
    with pytest.MonkeyPatch.context() as patch, socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        number = one.getsockname()[1]
        one.close()
        patch.setenv("HOME", str(folder / "home"))
        slices, lines = slices_in(folder), []
        summary = lead_in(folder, number, slices, lines)
        return folder, slices, summary, lines


def test_one_command_creates_trains_and_deletes(uninterrupted):
    folder, slices, summary, lines = uninterrupted
    check_end(folder, slices, summary)
    assert slices.events[0] == "create" and slices.events.count("create") == 1
    assert any(line.startswith("step 4/4") for line in lines)
    assert summary["attempts"] == summary["nodes"] == 1
    assert launch_of(folder)["attempts"][0]["exits"] == [0, 0]
    assert weights(folder)
    for worker in (0, 1):
        assert (folder / "to" / "logs" / "attempt-1" / f"worker-{worker}.log").is_file()


def step_is_there(folder, step):
    return any((folder / "to" / "run" / "checkpoints").glob(f"{step}/manifest.json"))


def fault_after(folder, step, fault):
    """Calls `fault` once a checkpoint is whole; a thread."""

    def wait():
        while not step_is_there(folder, step):
            time.sleep(0.05)
        fault()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "preempt"])
@pytest.mark.parametrize("seed", range(10))
def test_a_run_with_a_fault_ends_with_the_same_bits(tmp_path, port, uninterrupted, kind, seed):
    draw = random.Random(seed)
    slices = slices_in(tmp_path)
    worker, delay = draw.randrange(2), draw.random()

    def fault():
        time.sleep(delay)
        if kind == "kill":
            slices.kill(slices._all()[worker], signal.SIGKILL)
        else:
            slices.preempt()

    create = slices.create

    def create_again():
        create()
        slices.states = [State(Phase.READY, "READY")]

    slices.create = create_again
    fault_after(tmp_path, draw.randint(1, 3), fault)
    summary = lead_in(tmp_path, port, slices, [])
    check_end(tmp_path, slices, summary)
    expected, tuned = weights(uninterrupted[0]), weights(tmp_path)
    assert expected.keys() == tuned.keys()
    for name in expected:
        np.testing.assert_array_equal(expected[name], tuned[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("how", [BEFORE, MIDDLE, AFTER])
def test_a_connection_broken_at_each_step_starts_nothing_twice(tmp_path, port, monkeypatch, how):
    monkeypatch.setattr("jaxft.pods.attempts.hosts.PAUSE_SECONDS", 0.2)
    slices = slices_in(tmp_path)
    broken = set()

    def breaks(kind, worker, argv):
        words = " ".join([kind, *argv])
        step = next((step for step in STEPS if step in words and (step, worker.number) not in broken), None)
        if step is None:
            return None
        broken.add((step, worker.number))
        return how

    slices.breaks = breaks
    most = 0
    create = slices.create

    def watch():
        nonlocal most
        while slices.incarnation == 0 or slices.alive:
            for worker in slices._all():
                leaders = [pid for pid in slices.processes(worker) if b"--expect_platform" in _command(pid)]
                most = max(most, len([pid for pid in leaders if b"jaxft.cli" in _command(pid)]))
            time.sleep(0.2)

    slices.create = create
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    summary = lead_in(tmp_path, port, slices, [])
    check_end(tmp_path, slices, summary)
    assert {step for step, _ in broken} >= {"copy", "tar", "setup.sh", "start.sh", "state.sh"}
    assert most == 1 and summary["nodes"] == 1


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
@pytest.mark.parametrize("line", ["creates node", "sets up", "checked", "training runs", "step 2/4", "deletes node"])
def test_a_front_killed_with_9_is_replaced_by_the_same_command(tmp_path, port, line):
    command = [sys.executable, str(Path(__file__).with_name("stub_pod.py")), str(tmp_path), str(port)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as front:
        for text in front.stdout:
            if text.startswith(line):
                front.kill()
                break
    slices = slices_in(tmp_path)
    if line != "deletes node":
        assert subprocess.run(command, env=environment, check=False, stdout=subprocess.DEVNULL).returncode == 0
    else:
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    launch = launch_of(tmp_path)
    assert launch["state"] == "done" and len(launch["nodes"]) == len(launch["attempts"]) == 1
    assert len(list((tmp_path / "nodes").glob("[0-9]*"))) == 1 and not slices.alive
