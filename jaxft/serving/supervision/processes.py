"""Workers as processes: started with a lock that is theirs for life, by which also a later server knows them."""

import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jaxft.serving.jobs.folder import JobFolder

Goal = Literal["validate", "train"]
DIGITS = 20  # of a process number


def spawn(folder: JobFolder, goal: Goal, command: Sequence[str]) -> "subprocess.Popen[bytes] | None":
    """Starts the worker of a job; None if it has one already.

    The lock is taken here and inherited, so that there is no moment in which a worker is without it. What an earlier
    worker said of its end is removed first.
    """
    descriptor = os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        os.ftruncate(descriptor, 0)
        folder.outcome.unlink(missing_ok=True)
        with open(folder.log, "ab") as log:
            return subprocess.Popen(
                [*command, str(folder.path), f"--goal={goal}", f"--lock={descriptor}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(descriptor,),
                start_new_session=True,
            )
    finally:
        os.close(descriptor)


def enter_worker(descriptor: int) -> None:
    """In the worker, first of all: keeps the lock for itself, and writes its process number into it."""
    os.set_inheritable(descriptor, False)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


def is_alive(lock: Path) -> bool:
    """Whether a worker has the lock."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def send(lock: Path, number: signal.Signals, *, group: bool = False) -> bool:
    """Sends a signal to the worker that has the lock, or to all of its processes; False if it is not known yet."""
    text = lock.read_bytes()[:DIGITS].strip() if lock.is_file() else b""
    if not text.isdigit() or not is_alive(lock):
        return False
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(int(text), number)
    return True
