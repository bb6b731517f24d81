"""`jaxft pod run` with processes: folders play hosts, on which `jaxft train` runs; or it is played, to be quick."""

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

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from bucket_server import serving
from google_on_loopback import COMPUTE, Google
from stub_pod import lead_in, slices_in
from stub_slices import AFTER, BEFORE, MIDDLE

from jaxft.errors import PodError
from jaxft.pods.slices import Phase, State

pytestmark = pytest.mark.slow
# Each command on a host, or its script, and what copies files.
STEPS = {
    "true", "mkdir", "sha256sum", "copy", "tar", "setup.sh", "state.sh", "jaxft", "start.sh", "upload_logs.sh",
    "log.sh", "fetch",
}  # fmt: skip


@pytest.fixture
def port():
    return free_port()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def last_state(folder):
    """Parameters, state of the optimizer and key of the last step, by name."""
    step = folder / "to" / "run" / "checkpoints" / "4" / "state"
    checkpointer = ocp.PyTreeCheckpointer()
    tree = checkpointer.metadata(step).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return dict(jax.tree_util.tree_flatten_with_path(checkpointer.restore(step, restore_args=as_numpy))[0])


def check_same_bits(first, second):
    expected, found = last_state(first), last_state(second)
    assert expected.keys() == found.keys() and len(expected) > 40
    for path, value in expected.items():
        np.testing.assert_array_equal(value, found[path], err_msg=str(path))


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
def undisturbed(tmp_path_factory):
    """A run of two hosts without any fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "home").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))
        slices, lines = slices_in(folder), []
        summary = lead_in(folder, free_port(), slices, lines)
        return folder, slices, summary, lines


def test_one_command_creates_trains_and_deletes(undisturbed):
    folder, slices, summary, lines = undisturbed
    check_end(folder, slices, summary)
    assert slices.events[0] == "create" and slices.events.count("create") == 1
    assert any(line.startswith("step 4/4") for line in lines)
    assert summary["attempts"] == summary["nodes"] == 1
    assert launch_of(folder)["attempts"][0]["exits"] == [0, 0]
    for worker in (0, 1):
        assert (folder / "to" / "logs" / "attempt-1" / f"worker-{worker}.log").is_file()


@pytest.mark.parametrize("how", [MIDDLE, AFTER, BEFORE])
@pytest.mark.parametrize("played", [True, False])
def test_a_connection_broken_at_each_step_starts_nothing_twice(tmp_path, port, request, monkeypatch, how, played):
    monkeypatch.setattr("jaxft.pods.attempts.hosts.PAUSE_SECONDS", 0.2)
    slices = slices_in(tmp_path, played=played)
    broken, started = set(), []

    def breaks(kind, worker, argv):
        step = kind if kind != "ssh" else Path(argv[1] if argv[0] == "bash" else argv[0]).name
        if (step, worker.number) in broken:
            return None
        broken.add((step, worker.number))
        return how

    slices.breaks = breaks

    def watch():
        while slices.incarnation == 0 or slices.alive:
            for worker in slices._all():
                commands = {pid: _command(pid) for pid in slices.processes(worker)}
                mark = b"fake_train" if played else b"jaxft.cli"
                pids = [pid for pid, one in commands.items() if mark in one and b"--expect_platform" in one]
                started.extend((worker.number, pid) for pid in pids if (worker.number, pid) not in started)
            time.sleep(0.1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    summary = lead_in(tmp_path, port, slices, [])
    check_end(tmp_path, slices, summary)
    assert {step for step, _ in broken} == STEPS
    assert sorted(worker for worker, _ in started) == [0, 1] and summary["nodes"] == summary["attempts"] == 1
    if not played:
        check_same_bits(request.getfixturevalue("undisturbed")[0], tmp_path)


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def rewritten(slices, script, change):
    """Changes the arguments of a script on its way to a host: change(worker, argv) -> argv."""
    ssh = slices.ssh

    def call(worker, argv, **options):
        here = len(argv) > 1 and argv[1].endswith(script)
        return ssh(worker, change(worker, list(argv)) if here else argv, **options)

    slices.ssh = call


def replaced(argv, name, value):
    """The arguments, of which one has another value."""
    return [f"{name}={value}" if one.startswith(f"{name}=") else one for one in argv]


def test_processes_that_never_meet_are_taken_for_lost_machines(tmp_path, port):
    slices = slices_in(tmp_path)

    def no_way(worker, argv):
        """Worker 1 does not reach worker 0, as with a firewall between them."""
        argv = replaced(argv, "--coordinator", f"127.0.0.1:{free_port()}") if worker.number else argv
        return [*argv, "--start_seconds=10"]

    rewritten(slices, "start.sh", no_way)
    with pytest.raises(PodError, match=r"preempted: worker 0: .*process 1 of 2 did not come to process 0 at 127"):
        lead_in(tmp_path, port, slices, [], retries=0)
    assert launch_of(tmp_path)["attempts"][0]["exits"] == [69, 69] and not slices.alive


def test_a_port_in_use_is_refused_by_name(tmp_path, port, monkeypatch):
    monkeypatch.setattr("jaxft.pods.attempts.follow.PEER_SECONDS", 3.0)
    slices = slices_in(tmp_path)
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(PodError, match=r"refused: worker 0: .*another program on this machine listens at 127"):
            lead_in(tmp_path, port, slices, [])
    assert launch_of(tmp_path)["attempts"][0]["exits"][0] == 2 and len(launch_of(tmp_path)["attempts"]) == 1
    assert not slices.alive


def test_a_wrong_count_of_processes_is_refused_by_name(tmp_path, port):
    slices = slices_in(tmp_path)

    def one_more(worker, argv):
        return [*(replaced(argv, "--num_processes", 3) if worker.number else argv), "--start_seconds=10"]

    rewritten(slices, "start.sh", one_more)
    with pytest.raises(PodError, match=r"refused: worker 1: .*processes"):
        lead_in(tmp_path, port, slices, [])
    exits = launch_of(tmp_path)["attempts"][0]["exits"]
    assert exits[1] == 2 and len(launch_of(tmp_path)["attempts"]) == 1 and not slices.alive


def killed_front(folder, port, event, options, made=None):
    """`jaxft pod run` as a process, killed with -9 as soon as it has printed a line that begins with `event`, and the
    path `made` exists.
    """
    command = [sys.executable, str(Path(__file__).with_name("stub_pod.py")), str(folder), str(port)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "STUB_POD": json.dumps(options)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as front:
        for text in front.stdout:
            if text.startswith(event):
                while made is not None and not made.exists():
                    time.sleep(0.02)
                front.kill()
                break
        else:
            raise AssertionError(f"{event!r} did not come")
    return command, environment


def ready_again(slices):
    """Machines that are created after others were lost are ready at once."""
    create = slices.create

    def create_again():
        create()
        slices.states = [State(Phase.READY, "READY")]

    slices.create = create_again


def test_two_hosts_write_a_run_into_a_bucket_and_go_on_from_it(tmp_path, port, undisturbed, google):
    pytest.importorskip("gcsfs")
    with serving() as server:
        metadata = google.address.removeprefix("http://")
        names = {"GCE_METADATA_HOST": metadata, "GCE_METADATA_IP": metadata, "JAXFT_METADATA": google.address}
        slices = slices_in(tmp_path, env={**server.environment(), **names})
        ready_again(slices)

        def lose_machines_after_step_2():
            while "runs/one/run/checkpoints/2/manifest.json" not in server.names("bucket", "runs/one/run/checkpoints/"):
                time.sleep(0.05)
            slices.preempt()

        threading.Thread(target=lose_machines_after_step_2, daemon=True).start()
        summary = lead_in(tmp_path, port, slices, [], to="gs://bucket/runs/one", shared=False)
        assert summary["state"] == "done" and summary["step"] == 4 and summary["nodes"] == 2 and not slices.alive
        for name in server.names("bucket", "runs/one/run/"):
            file = tmp_path / "to" / name.removeprefix("runs/one/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(server.read("bucket", name))
    assert {"summary.json", "report.html", "metrics.jsonl"} <= set(os.listdir(tmp_path / "to" / "run"))
    check_same_bits(undisturbed[0], tmp_path)


EVENTS = [
    ("creates node", [1]), ("node 1 in us-east5-b is ready", [1]), ("# ssh 0 setup.sh", [1]),
    ("# ssh 1 start.sh", [1, 1]), ("step 2/4", [1, 1]), ("# fetch 0 jaxft-pod/runs/run-1/output", [1]),
    ("# delete", [1]),
]  # fmt: skip


@pytest.mark.parametrize("played", [True, False])
@pytest.mark.parametrize(("event", "hosts"), EVENTS)
def test_a_front_killed_with_9_is_replaced_by_the_same_command(tmp_path, port, event, hosts, played):
    options = {"hosts": hosts, "played": played}
    command, environment = killed_front(tmp_path, port, event, options)
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    launch, slices = launch_of(tmp_path), slices_in(tmp_path, **options)
    assert launch["state"] == "done" and len(launch["nodes"]) == len(launch["attempts"]) == 1
    assert len(list((tmp_path / "nodes").glob("[0-9]*"))) == 1 and not slices.alive
    assert not [pid for worker in slices._all() for pid in slices.processes(worker)]
    assert (tmp_path / "to" / "run" / "checkpoints" / "4" / "manifest.json").is_file()


@pytest.fixture
def google():
    one = Google()
    yield one
    one.close()


@pytest.mark.parametrize("event", ["# ssh 0 setup.sh", "# ssh 0 start.sh"])
def test_the_watchdog_deletes_what_a_killed_front_has_left(tmp_path, port, google, event):
    begin = time.time()

    def clock(minutes):
        (tmp_path / "new").write_text(str(int(begin + 60 * minutes)))
        (tmp_path / "new").rename(tmp_path / "clock")

    clock(0)
    node = f"{COMPUTE}/instances/run-1-1"
    google.answers |= {("GET", node): 200, ("DELETE", node): 200}
    options = {
        "hosts": [1], "env": {**google.environment, "JAXFT_CLOCK": str(tmp_path / "clock")},
        "guard": ["--api=compute", "--node=run-1-1"],
    }  # fmt: skip
    runs = tmp_path / "nodes" / "1" / "worker-0" / "jaxft-pod" / "runs" / "run-1"
    # A front that dies before the call has reached the host has started nothing.
    killed_front(tmp_path, port, event, options, made=runs / "attempts" / "1" if event.endswith("start.sh") else None)
    slices = slices_in(tmp_path, **options)
    worker = slices.workers()[0]
    try:
        if event.endswith("start.sh"):
            clock(60)  # training runs, which is no reason to delete anything
            while not (runs / "attempts" / "1" / "exit").exists():
                time.sleep(0.1)
            assert not google.deletes()
            why = "attempt 1 ended with 0, and nobody has looked at it for 20 minutes"
        else:
            # The set-up that was begun ends by itself.
            while any(b"setup.sh" in _command(pid) for pid in slices.processes(worker)):
                time.sleep(0.1)
            why = "nothing of the run is alive, and nobody has looked at it for 20 minutes"
        clock(81)
        for _ in range(300):
            if google.deletes():
                break
            time.sleep(0.1)
        assert set(google.deletes()) == {node}
        assert why in (runs / "guard" / "log").read_text()
    finally:
        slices.delete()


def after_step(folder, step, slices, fault):
    """Calls `fault` once a checkpoint is whole, or the machines are there for step 0; a thread."""

    def wait():
        while not slices.alive:
            time.sleep(0.02)
        while step and not (folder / "to" / "run" / "checkpoints" / str(step) / "manifest.json").exists():
            time.sleep(0.02)
        fault()

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", ["kill", "preempt"])
@pytest.mark.parametrize("played", [True, False])
def test_a_run_with_a_fault_ends_with_the_same_bits(tmp_path, port, request, kind, seed, played):
    draw = random.Random(f"{kind} {seed}")
    slices = slices_in(tmp_path, played=played)
    # A killed process is replaced only after progress; lost machines are at any moment.
    step = draw.randint(0 if kind == "preempt" else 1, 2 if played else 3)
    worker, delay = draw.randrange(2), draw.uniform(0, 1 if step else 2 if played else 15)
    hit = []

    def fault():
        time.sleep(delay)
        hit.extend(slices.processes(slices._all()[worker]))
        if kind == "kill":
            slices.kill(slices._all()[worker], signal.SIGKILL)
        else:
            slices.preempt()

    ready_again(slices)
    after_step(tmp_path, step, slices, fault)
    summary = lead_in(tmp_path, port, slices, [])
    check_end(tmp_path, slices, summary)
    assert summary["nodes"] == (1 if kind == "kill" else 2) and (hit or not step)
    if not played:
        check_same_bits(request.getfixturevalue("undisturbed")[0], tmp_path)
