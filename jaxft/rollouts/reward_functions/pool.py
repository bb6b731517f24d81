"""Processes that call reward functions and environments, each call with a deadline."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

WORKER = Path(__file__).with_name("worker.py")
TRIES = 2  # of a call whose process dies


@dataclass(eq=False, kw_only=True)
class Call:
    """One call of a function. outcome: `ok` with the result, `error` with its text, `timeout`, or `died`.

    kind: see `worker`. raised: the error of a function that raised, while its process looks for the answer that is to
    blame. seat: all calls of the same seat go to the same process, for as long as it lives; None: to any. Such calls
    are not repeated, since what the process knew is lost with it.
    """

    source: str
    name: str
    kind: Literal["load", "call", "load class", "reset", "step", "reward"] = "call"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seat: int | None = None
    outcome: Literal["ok", "error", "timeout", "died"] | None = None
    result: Any = None
    raised: str | None = None
    tries: int = 0


@dataclass(eq=False)
class Worker:
    """A process, and the call that it is busy with."""

    process: "subprocess.Popen[bytes]"
    connection: Connection
    seat: int | None = None
    call: Call | None = None
    deadline: float = 0.0

    def finish(self) -> Call:
        """The call that it was busy with; it is idle from now on."""
        call, self.call = self.call, None
        if call is None:
            raise RuntimeError("an idle process answered: it was given no call")
        return call


class Pool:
    """Worker processes, started when they are first needed; a context manager, which ends them.

    size: most processes; seats are numbered below it. timeout: seconds of a call. A process that takes longer is
    killed, and another takes its place. A call without a seat whose process dies is tried once more in another one.
    """

    def __init__(self, size: int, timeout: float) -> None:
        self._size, self._timeout = size, timeout
        self._workers: list[Worker] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes; harmless when called again."""
        for worker in self._workers:
            self._end(worker)
        self._workers = []

    def run(self, calls: Sequence[Call]) -> None:
        """Makes all calls, several at the same time, and sets their outcomes."""
        waiting = deque(calls)
        try:
            while waiting or any(worker.call for worker in self._workers):
                self._hand_out(waiting)
                busy = [worker for worker in self._workers if worker.call]
                first = min(worker.deadline for worker in busy)
                ready = wait([worker.connection for worker in busy], max(0.0, first - time.monotonic()))
                for worker in busy:
                    if worker.connection in ready:
                        self._receive(worker, waiting)
                    elif time.monotonic() >= worker.deadline:
                        self._drop(worker, "timeout", waiting)
        except BaseException:
            # The processes may be in the middle of calls, whose answers nobody waits for.
            self.close()
            raise

    def _hand_out(self, waiting: deque[Call]) -> None:
        for call in list(waiting):
            if len(self._workers) >= self._size and all(worker.call for worker in self._workers):
                return
            worker = self._idle(call.seat)
            if worker is None:
                continue
            waiting.remove(call)
            call.tries += 1
            worker.call, worker.deadline = call, time.monotonic() + self._timeout
            with contextlib.suppress(BrokenPipeError):  # then it has died, and its connection says so
                worker.connection.send((call.kind, call.source, call.name, call.arguments))

    def _idle(self, seat: int | None) -> Worker | None:
        """A process that can take a call of this seat now, started if there is room for another one."""
        own = [worker for worker in self._workers if seat is None or worker.seat == seat]
        idle = next((worker for worker in own if worker.call is None), None)
        if idle is not None or len(self._workers) >= self._size or (own and seat is not None):
            return idle
        self._workers.append(_start(seat))
        return self._workers[-1]

    def _receive(self, worker: Worker, waiting: deque[Call]) -> None:
        try:
            outcome, result = worker.connection.recv()
        except (EOFError, OSError):
            self._drop(worker, "died", waiting)
            return
        if outcome == "raised":
            if worker.call is not None:
                worker.call.raised = result
            return
        call = worker.finish()
        call.outcome, call.result = outcome, result

    def _drop(self, worker: Worker, outcome: Literal["timeout", "died"], waiting: deque[Call]) -> None:
        """Ends a process whose call is not answered."""
        call = worker.finish()
        self._end(worker)
        self._workers.remove(worker)
        if call.raised is not None:  # it has failed, whatever became of the search
            call.outcome, call.result = "ok", (None, (None, call.raised))
        elif outcome == "died" and call.tries < TRIES and call.seat is None:
            waiting.append(call)
        else:
            call.outcome, call.result = outcome, worker.process.returncode

    @staticmethod
    def _end(worker: Worker) -> None:
        # With the processes that the function started: they are of the group that the worker leads.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.kill()
        worker.process.wait()
        worker.connection.close()


def _start(seat: int | None) -> Worker:
    ours, theirs = Pipe()
    # Accelerators belong to the run; and Ctrl-C is for the run, which ends its processes itself.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, str(WORKER), str(theirs.fileno()), *map(str, sys.path)],
        pass_fds=[theirs.fileno()],
        env=env,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    theirs.close()
    return Worker(process, ours, seat)
