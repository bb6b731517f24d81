"""One writer of a folder at a time: processes, their deaths, and file systems without locks or of several hosts."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from jaxft.errors import ExportError, FolderInUseError
from jaxft.files.locks import lock as locks
from jaxft.files.locks.lock import check, lock, lock_file, owner_now
from jaxft.files.locks.owner import Owner, is_of_one_machine, owner_of, running_kernel
from jaxft.files.targets import locked_output

ROOT = Path(__file__).parents[2]
# A process that takes a lock, says so, and keeps it until its standard input ends.
KEEPER = """
import sys
from jaxft.files.locks.lock import lock
with lock(sys.argv[1], "jaxft train", inside=sys.argv[2] == "inside"):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def keeper(target: Path, *, inside: bool):
    """Another process that has the lock of a target."""
    process = subprocess.Popen(
        [sys.executable, "-c", KEEPER, str(target), "inside" if inside else "beside"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def leave(path: Path, **changes) -> Owner:
    """A lock file of an owner on another host, as a process that was killed there leaves it."""
    values = asdict(Owner(what="jaxft train", host="elsewhere", machine="another kernel", pid=1)) | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Owner(**values).to_text())
    return Owner(**values)


@pytest.fixture
def quick(monkeypatch):
    """Leases that run fast."""
    monkeypatch.setattr(locks, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.4)
    monkeypatch.setattr(locks, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.05)


@pytest.fixture
def network(monkeypatch, quick):
    """A file system that several hosts mount, whose locks other hosts do not see."""
    monkeypatch.setattr(locks, "is_of_one_machine", lambda folder: False)


@pytest.fixture
def lockless(monkeypatch, network):
    """The same without any locks."""

    def flock(descriptor, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("inside", [True, False])
def test_another_process_is_refused_until_the_first_is_killed(tmp_path, inside):
    target = tmp_path / "a" / "out"
    file = lock_file(target, inside=inside)
    with keeper(target, inside=inside) as process:
        start = time.monotonic()
        with pytest.raises(
            FolderInUseError,
            match=rf"out is being written by `jaxft train` on host .*, process {process.pid}, since .*Wait until it",
        ):
            with lock(target, "jaxft export", inside=inside):
                pass
        assert time.monotonic() - start < 3
        assert owner_now(target, inside=inside).pid == process.pid
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert file.exists() and owner_now(target, inside=inside) is None
        with lock(target, "jaxft export", inside=inside):
            assert owner_of(file.read_text()).pid == os.getpid()
    assert not file.exists()


def test_nothing_is_left_of_a_lock_and_of_folders_made_for_it(tmp_path):
    with lock(tmp_path / "a" / "run", "jaxft train", inside=True):
        assert (tmp_path / "a" / "run" / "jaxft_lock.json").is_file()
    assert os.listdir(tmp_path) == []
    with lock(tmp_path / "a" / "run", "jaxft train", inside=True):
        (tmp_path / "a" / "run" / "work").write_text("x")
    assert os.listdir(tmp_path / "a" / "run") == ["work"]


def test_a_copied_folder_is_not_locked(tmp_path):
    with lock(tmp_path / "run", "jaxft train", inside=True):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        assert owner_now(tmp_path / "copy", inside=True) is None
        with lock(tmp_path / "copy", "jaxft train", inside=True):
            pass


def test_callers_of_one_process_share_a_lock_but_with_two_that_are_exclusive(tmp_path):
    run = tmp_path / "run"
    with lock(run, "jaxft quickstart", inside=True, exclusive=False):
        with lock(run, "jaxft train", inside=True):
            with pytest.raises(FolderInUseError, match="which is this process"), lock(run, "jaxft train", inside=True):
                pass
        with lock(run, "jaxft.Session", inside=True, exclusive=False):
            assert owner_now(run, inside=True).what == "jaxft quickstart"
    assert not run.exists()


@pytest.mark.filterwarnings("ignore:os.fork")
def test_a_child_that_outlives_its_parent_has_no_lock(tmp_path):
    with lock(tmp_path / "run", "jaxft train", inside=True):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        os.close(reader)
    with lock(tmp_path / "run", "jaxft train", inside=True):  # the child still runs
        pass
    os.close(writer)
    os.waitpid(child, 0)


def test_many_threads_and_a_look_at_the_lock_find_one_owner_at_a_time(tmp_path):
    inside, most, refused = [], [], []

    def work():
        for _ in range(20):
            try:
                with lock(tmp_path / "out", "jaxft export"):
                    inside.append(1)
                    most.append(len(inside))
                    owner_now(tmp_path / "out")
                    inside.pop()
            except FolderInUseError as error:
                refused.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(most) + len(refused) == 80
    assert os.listdir(tmp_path) == []


def test_a_link_in_the_way_of_a_lock_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    lock_file(tmp_path / "out").symlink_to(tmp_path / "mine")
    with (
        pytest.raises(ExportError, match="out cannot be made.*Give a new path"),
        locked_output(tmp_path / "out", "jaxft export"),
    ):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    "text", ["", "\0" * 300, '{"jaxft_lock": 1}', '{"jaxft_lock": 1, "pid": "x"}', '{"jaxft_lock": 1, "wh']
)
def test_a_lock_file_that_names_nobody_is_free(tmp_path, text):
    lock_file(tmp_path / "out").write_text(text)
    assert owner_now(tmp_path / "out") is None
    with lock(tmp_path / "out", "jaxft export"):
        assert json.loads(lock_file(tmp_path / "out").read_text())["pid"] == os.getpid()


def test_a_file_of_another_program_is_not_overwritten(tmp_path):
    lock_file(tmp_path / "out").write_text("mine")
    with pytest.raises(ExportError, match="is in the way, and is no lock file"):
        with locked_output(tmp_path / "out", "jaxft export"):
            pass
    assert lock_file(tmp_path / "out").read_text() == "mine"


def test_nothing_is_written_to_an_address():
    with (
        pytest.raises(
            ExportError, match=r"gs://bucket/out is an address.*gcloud storage cp --recursive OUTPUT gs://bucket/out"
        ),
        locked_output("gs://bucket/out", "jaxft export"),
    ):
        pass


# -- file systems that several hosts mount -----------------------------------------------------------


def test_disks_of_this_machine_are_told_from_mounts_of_many(tmp_path, monkeypatch):
    lines = (
        "22 1 8:1 / / rw - ext4 /dev/root rw\n"
        "23 22 0:50 / /mnt/my\\040share rw shared:1 - nfs4 host:/export rw\n"
        "24 23 0:51 / /mnt/my\\040share/scratch rw - xfs /dev/sdb rw\n"
    )
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **how: lines if "mountinfo" in str(path) else read(path, **how))
    assert is_of_one_machine("/home/me") and is_of_one_machine("/mnt/my share/scratch/run")
    assert not is_of_one_machine("/mnt/my share/run") and is_of_one_machine("/mnt/my shared")


@pytest.mark.parametrize("kind", ["network", "lockless"])
def test_a_lease_that_is_renewed_refuses_another_host(tmp_path, request, kind):
    request.getfixturevalue(kind)
    path = lock_file(tmp_path / "run", inside=True)
    first = leave(path)
    stop = threading.Event()

    def renew():
        while not stop.wait(0.05):
            leave(path, id=first.id)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(FolderInUseError, match="on host elsewhere, process 1"):
            with lock(tmp_path / "run", "jaxft train", inside=True):
                pass
        assert owner_now(tmp_path / "run", inside=True).host == "elsewhere"
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("kind", ["network", "lockless"])
def test_a_lease_that_is_not_renewed_is_taken_over_and_says_so(tmp_path, request, caplog, kind):
    request.getfixturevalue(kind)
    path = lock_file(tmp_path / "run", inside=True)
    leave(path)
    start = time.monotonic()
    with lock(tmp_path / "run", "jaxft train", inside=True):
        assert time.monotonic() - start >= 0.4
        assert owner_of(path.read_text()).pid == os.getpid()
    assert "taken over from `jaxft train` on host elsewhere" in caplog.text
    leave(path, renewed=time.time() - 3600)  # by far too old to be waited for
    start = time.monotonic()
    with lock(tmp_path / "run", "jaxft train", inside=True):
        assert time.monotonic() - start < 0.4


def test_a_process_of_this_machine_that_died_is_not_waited_for(tmp_path, lockless):
    dead = subprocess.Popen(["true"])
    dead.wait()
    path = lock_file(tmp_path / "run", inside=True)
    mine = Owner(what="x")
    leave(path, machine=mine.machine, host=mine.host, pid=dead.pid)
    assert owner_now(tmp_path / "run", inside=True) is None
    start = time.monotonic()
    with lock(tmp_path / "run", "jaxft train", inside=True):
        assert time.monotonic() - start < 0.4


def test_a_process_in_another_container_is_waited_for_although_its_number_is_nobodys_here(tmp_path, lockless):
    dead = subprocess.Popen(["true"])
    dead.wait()
    path = lock_file(tmp_path / "run", inside=True)
    leave(path, machine=running_kernel().partition(" ")[0] + " pid:[7]", pid=dead.pid)
    assert owner_now(tmp_path / "run", inside=True).pid == dead.pid
    start = time.monotonic()
    with lock(tmp_path / "run", "jaxft train", inside=True):
        assert time.monotonic() - start >= 0.4


def test_a_lock_of_another_container_on_this_machine_ends_with_its_process(tmp_path, network):
    """The kernel, which both share, has freed it."""
    leave(lock_file(tmp_path / "run", inside=True), machine=running_kernel().partition(" ")[0] + " pid:[7]")
    assert owner_now(tmp_path / "run", inside=True) is None
    start = time.monotonic()
    with lock(tmp_path / "run", "jaxft train", inside=True):
        assert time.monotonic() - start < 0.4


def test_a_pipe_in_the_way_of_a_lock_is_not_waited_for(tmp_path):
    os.mkfifo(lock_file(tmp_path / "out"))
    with pytest.raises(FileExistsError, match="is in the way, and is no lock file"):
        with lock(tmp_path / "out", "jaxft convert"):
            pass


def test_an_owner_renews_its_lease_and_stops_once_another_has_it(tmp_path, network):
    path = lock_file(tmp_path / "run", inside=True)
    with lock(tmp_path / "run", "jaxft train", inside=True):
        first = owner_of(path.read_text()).renewed
        until = time.monotonic() + 5
        while owner_of(path.read_text()).renewed == first and time.monotonic() < until:
            time.sleep(0.02)
        assert owner_of(path.read_text()).renewed > first
        check(tmp_path / "run", inside=True)
        other = leave(path)
        with pytest.raises(FolderInUseError, match=r"has expired.*belongs to .*elsewhere.*Nothing more is written"):
            check(tmp_path / "run", inside=True)
        time.sleep(0.2)
        assert owner_of(path.read_text()) == other, "the lease of the other is not renewed in its name"
    assert owner_of(path.read_text()) == other, "nor removed"
