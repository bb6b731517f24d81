"""What a server has seen of one job's worker: the files that it reads, and the signals that it has sent."""

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from typing import Any

from jaxft.serving.jobs.folder import JobFolder
from jaxft.serving.supervision import processes
from jaxft.serving.supervision.tailing import Tail


@dataclass
class Watch:
    """The worker of one job. active: whether there is one whose end is still to be seen. goal: what it was started for.

    process: if this server started it. not_before: when it may be started again. stopped_at: when it was told to stop.
    ended_at: when its outcome was seen. All in seconds of the monotonic clock.
    """

    folder: JobFolder
    active: bool = False
    goal: processes.Goal = "train"
    process: "subprocess.Popen[bytes] | None" = None
    not_before: float = 0.0
    stopped_at: float | None = None
    ended_at: float | None = None
    metrics: Tail = field(init=False)
    events: Tail = field(init=False)

    def __post_init__(self) -> None:
        self.metrics, self.events = Tail(self.folder.metrics), Tail(self.folder.events)

    @property
    def is_alive(self) -> bool:
        """Whether the worker lives."""
        return processes.is_alive(self.folder.lock)

    def start(self, goal: processes.Goal, command: list[str]) -> None:
        """Starts a worker, unless there is one."""
        self.process = processes.spawn(self.folder, goal, command)
        self.active, self.goal, self.stopped_at, self.ended_at = True, goal, None, None

    def new_events(self) -> list[dict[str, Any]]:
        """What the worker has told since the last call."""
        out = []
        for line in self.events.lines():
            try:
                event = json.loads(line)
            except ValueError:  # a line that was cut off by a full disk or a crash
                continue
            if isinstance(event, dict) and isinstance(event.get("kind"), str):
                out.append(event)
        return out

    def tell_to_stop(self, kill_after: float | None) -> None:
        """Sends SIGTERM, once. kill_after: seconds from then to SIGKILL of all its processes; None: never."""
        if self.stopped_at is None:
            if processes.send(self.folder.lock, signal.SIGTERM):
                self.stopped_at = time.monotonic()
        elif kill_after is not None and time.monotonic() - self.stopped_at > kill_after:
            self.kill()

    def kill(self) -> None:
        """Ends all processes of the worker."""
        processes.send(self.folder.lock, signal.SIGKILL, group=True)

    def end_after_outcome(self, seconds: float) -> None:
        """Ends a worker that has said how it ended, so many seconds ago, and has not gone."""
        if self.ended_at is None:
            self.ended_at = time.monotonic() if self.folder.outcome.is_file() else None
        elif time.monotonic() - self.ended_at > seconds:
            self.kill()

    def silent_seconds(self) -> float:
        """Seconds since the worker wrote anything."""
        files = (self.folder.metrics, self.folder.events, self.folder.log, self.folder.lock)
        times = [os.stat(path).st_mtime for path in files if path.is_file()]
        return time.time() - max(times, default=time.time())

    def exit_signal(self) -> int | None:
        """The number of the signal that ended the worker, as far as this server knows; it is a zombie no more."""
        if self.process is None:
            return None
        code = self.process.wait()
        return -code if code < 0 else None
