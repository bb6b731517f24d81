"""The scripts that run on the hosts: starts that are safe to repeat, stops, and what the state says."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stub_slices import AFTER, BROKEN, MIDDLE, ROOT, StubSlices

from jaxft.pods.command import Done
from jaxft.pods.slices import Worker

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts" / "worker"
# Appends a line when it starts, and ends with 75 on SIGTERM.
PROGRAM = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(75)))
with open(os.path.expanduser("~/starts"), "a") as file:
    file.write(f"{os.getpid()}\\n")
print("step 1", os.environ.get("HF_TOKEN", "without a token")[:3], flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def slices(tmp_path: Path) -> Iterator[StubSlices]:
    """One host on which the run r1 is set up, with a pack that holds PROGRAM."""
    slices = StubSlices(tmp_path / "cloud", hosts=(1,))
    slices.create()
    pack = home(slices) / ROOT / "packs" / "abc"
    pack.mkdir(parents=True)
    (pack / "program.py").write_text(PROGRAM)
    (home(slices) / ROOT / "runs" / "r1").mkdir(parents=True)
    (home(slices) / ROOT / "runs" / "r1" / "pack").symlink_to(pack)
    yield slices
    slices.delete()


def host(slices: StubSlices) -> Worker:
    return slices.workers()[0]


def home(slices: StubSlices) -> Path:
    return slices.home(host(slices))


def call(slices: StubSlices, script: str, *arguments: str, stdin: bytes = b"") -> Done:
    return slices.ssh(host(slices), ["bash", str(SCRIPTS / script), *arguments], stdin=stdin, seconds=30)


def start(slices: StubSlices, attempt: int = 1, *, seconds: float = 60, code: int = 0) -> Done:
    program = [sys.executable, "program.py", str(seconds), str(code)]
    return call(slices, "start.sh", "r1", str(attempt), "--", *program)


def state(slices: StubSlices, *arguments: str) -> dict:
    done = call(slices, "state.sh", "r1", *arguments)
    assert done.code == 0, done.err
    return json.loads(done.out)


def wait_for(slices: StubSlices, **wanted: object) -> dict:
    """The state once it has these values."""
    for _ in range(200):
        now = state(slices)
        if all(now[key] == value for key, value in wanted.items()):
            return now
        time.sleep(0.05)
    raise AssertionError(f"{wanted} did not come: {now}")


def starts(slices: StubSlices) -> int:
    path = home(slices) / "starts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_an_attempt_runs_detached_and_its_exit_code_is_read_back(slices: StubSlices) -> None:
    assert state(slices)["attempt"] == 0
    begun = start(slices, seconds=0.3, code=3)
    assert begun.code == 0 and "attempt 1 runs as" in begun.out
    ended = wait_for(slices, exit=3)
    assert ended["attempt"] == 1 and ended["alive"] is False and ended["last_line"] == "step 1 wit"
    assert ended["log_age"] < 10 and ended["disk_free"] > 0 and ended["pack"] == "abc"


def test_a_repeated_start_says_so_and_starts_nothing(slices: StubSlices) -> None:
    start(slices)
    wait_for(slices, last_line="step 1 wit")
    again = start(slices)
    assert again.code == 0 and "attempt 1 runs already" in again.out
    call(slices, "stop.sh", "r1")
    after = start(slices)
    assert after.code == 0 and "attempt 1 has ended with 75; nothing is started" in after.out
    assert starts(slices) == 1


@pytest.mark.parametrize("how", [MIDDLE, AFTER])
def test_a_connection_that_breaks_leaves_one_process(slices: StubSlices, how: str) -> None:
    breaks = [how, MIDDLE, None]
    slices.breaks = lambda kind, worker, argv: breaks.pop(0) if breaks else None
    assert start(slices) == BROKEN and start(slices) == BROKEN
    assert start(slices).code == 0
    wait_for(slices, last_line="step 1 wit", alive=True)
    assert starts(slices) == 1


def test_starts_at_the_same_time_leave_one_process(slices: StubSlices) -> None:
    program = [sys.executable, "program.py", "60", "0"]
    argv = ["bash", str(SCRIPTS / "start.sh"), "r1", "1", "--", *program]
    processes = [
        subprocess.Popen(argv, env=slices.environment(host(slices)), stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    words = [process.communicate(timeout=30)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted("already" in text for text in words) == [False, True, True, True]
    wait_for(slices, last_line="step 1 wit")
    assert starts(slices) == 1
