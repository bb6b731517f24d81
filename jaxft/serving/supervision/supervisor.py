"""The supervisor: a thread that starts the workers of jobs, reads what they tell, and settles how they end.

Nothing of what it needs to know is in its memory alone. A server that starts looks at every job: where the lock is
taken, it adopts the worker; where there is an outcome, it settles the job; else the worker has died.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.serving.storage.files import clean_files
from jaxft.serving.storage.jobs import ENDED, UNFINISHED, job_folder, job_of, jobs_in, request_of
from jaxft.serving.storage.state import State
from jaxft.serving.storage.uploads import clean_uploads
from jaxft.serving.supervision import ending
from jaxft.serving.supervision.reading import read_worker
from jaxft.serving.supervision.watch import Watch

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds: between two looks; from the cancellation of a job to the SIGKILL of its worker; from an outcome to it;
    without a sign of a worker; for workers to save when the server stops; between two cleanings. validators: workers
    that only examine rows, at a time.
    """

    look: float = 0.25
    kill: float = 30.0
    linger: float = 60.0
    silence: float = 1800.0
    drain: float = 45.0
    clean: float = 60.0
    validators: int = 2


class Supervisor:
    """Supervises the jobs of a state. command: starts a worker, before its arguments. devices: told by the last one.

    make_way: is told at every look whether training wants the devices, and says whether it may have them.
    """

    def __init__(
        self,
        state: State,
        command: Sequence[str],
        limits: Limits | None = None,
        make_way: Callable[[bool], bool] = lambda wanted: True,
    ) -> None:
        self._state, self._command, self._limits = state, list(command), limits or Limits()
        self._make_way = make_way
        self._watches: dict[str, Watch] = {}
        self._awake = threading.Event()
        self._draining_since: float | None = None
        self._cleaned = 0.0
        self._full = False
        self._thread = threading.Thread(target=self._run, name="supervisor")
        self.devices: Mapping[str, Any] | None = None

    def start(self) -> None:
        """Looks at every job as an earlier server left it, and begins to supervise."""
        for job in self._state.db.all("SELECT id, status FROM jobs ORDER BY n"):
            watch = Watch(job_folder(self._state, job["id"]))
            alive = watch.is_alive
            if job["status"] in UNFINISHED or alive:
                expected = job["status"] in ("running", "pausing") or watch.folder.outcome.is_file()
                watch.active = alive or expected
                self._watches[job["id"]] = watch
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it supervises; False also after an error of the program, which the log has."""
        return self._thread.is_alive()

    def wake(self) -> None:
        """Has it look now: there is something to do."""
        self._awake.set()

    def drain(self) -> None:
        """Starts nothing more, and has the workers save and stop."""
        if self._draining_since is None:
            self._draining_since = time.monotonic()
        self.wake()

    def stop(self) -> None:
        """Drains, and returns once the workers have stopped, or their time is over."""
        self.drain()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_done():
            self._awake.wait(self._limits.look)
            self._awake.clear()
            try:
                self._look()
                self._full = False
            except (OSError, sqlite3.OperationalError) as error:
                # A full disk, mostly. Nothing was entered, and the next look finds the same.
                if not self._full:
                    log.error("the state cannot be written: %s", error)
                self._full = True

    def _is_done(self) -> bool:
        if self._draining_since is None:
            return False
        late = time.monotonic() - self._draining_since > self._limits.drain
        return late or not any(watch.active for watch in self._watches.values())

    def _look(self) -> None:
        for job in jobs_in(self._state, *UNFINISHED):
            self._watches.setdefault(job["id"], Watch(job_folder(self._state, job["id"])))
        for id, watch in list(self._watches.items()):
            self._look_at(id, watch)
        if self._draining_since is None:
            self._start_workers()
        if time.monotonic() - self._cleaned > self._limits.clean:
            clean_files(self._state)
            clean_uploads(self._state)
            self._cleaned = time.monotonic()

    def _look_at(self, id: str, watch: Watch) -> None:
        alive = watch.is_alive  # before its files are read, so that all of a dead one is
        if watch.active:
            self.devices = read_worker(self._state, id, watch) or self.devices
            if not alive:
                ending.settle(self._state, id, watch)
        status = job_of(self._state, id)["status"]
        if not alive:
            if status in ENDED:
                ending.clean(watch)
                del self._watches[id]
            return
        if status in ENDED:
            watch.tell_to_stop(self._limits.kill)
        elif status in ("pausing", "paused") or self._draining_since is not None:
            watch.tell_to_stop(None)
        watch.end_after_outcome(self._limits.linger)
        if watch.silent_seconds() > self._limits.silence:
            log.error("%s: its worker gave no sign for %.0f s and is ended", id, self._limits.silence)
            watch.kill()

    def _start_workers(self) -> None:
        """Starts a worker for the oldest queued job if none trains, and for jobs whose rows are to be examined."""
        active = [watch for watch in self._watches.values() if watch.active]
        training = any(watch.goal == "train" for watch in active)
        validating = sum(watch.goal == "validate" for watch in active)
        queued, new = jobs_in(self._state, "queued"), jobs_in(self._state, "validating_files")
        free = self._make_way(training or bool(queued) or any(request_of(job)["start"] for job in new))
        for job in queued:
            if training or not free:
                break
            training = self._start(job["id"], "train")
        for job in new:
            if not training and free and request_of(job)["start"]:
                training = self._start(job["id"], "train")  # which examines the rows first
            elif validating < self._limits.validators:
                validating += self._start(job["id"], "validate")

    def _start(self, id: str, goal: Any) -> bool:
        """Whether the job has a worker with this goal now."""
        watch = self._watches.setdefault(id, Watch(job_folder(self._state, id)))
        if watch.active or time.monotonic() < watch.not_before:
            return watch.active and watch.goal == goal
        watch.start(goal, self._command)
        return True
