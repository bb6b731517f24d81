"""A cloud without processes: nodes and attempts follow a script, on a clock that only waiting moves."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxft.pods.command import Done
from jaxft.pods.slices import Phase, State, Worker

READY = State(Phase.READY, "READY")
BUSY = 16


@dataclass
class Clock:
    """Unix seconds that pass only while somebody waits."""

    time: float = 1_800_000_000.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


@dataclass
class Play:
    """One attempt.

    seconds: how long it runs; None for ever. exits: of its hosts. step: the newest checkpoint at its end. lost: the
    node's state at its end, if it takes the machines away. writes: whether it writes log lines on the way.
    busy: whether its start finds the chips held. log: what worker 0 writes.
    """

    exits: Sequence[int | None] = (0, 0)
    seconds: float | None = 60.0
    step: int | None = None
    lost: State | None = None
    writes: bool = True
    busy: bool = False
    log: str = "step 1/9  loss 1.0\njaxft train: the end\n"


@dataclass
class Node:
    """One creation. error: what it raises. states: what is told before READY. silent: the host that never answers."""

    error: Exception | None = None
    states: list[State] = field(default_factory=list)
    silent: int | None = None


class Cloud:
    """nodes, plays: the script, in order; the last node is repeated. events: what reached it."""

    def __init__(self, clock: Clock, plays: Sequence[Play], nodes: Sequence[Node] = (), hosts: int = 2) -> None:
        self.clock, self.plays, self.nodes = clock, list(plays), list(nodes)
        self.hosts, self.events, self.alive, self.output = hosts, [], {}, ScriptedOutput()
        self.begun: dict[int, float] = {}
        self.owner: dict[int, int] = {}
        self.stopped: dict[int, float] = {}
        self.delete_seconds = 0.0

    def slices_of(self, request, *, attempt, zone, hours, run, sleep):
        return Slices(self, attempt, zone, hours)

    def node(self, number: int) -> Node:
        return self.nodes[min(number, len(self.nodes)) - 1] if self.nodes else Node()

    def play(self, attempt: int) -> Play:
        return self.plays[attempt - 1]

    def ended(self, attempt: int) -> bool:
        play = self.play(attempt)
        if attempt in self.stopped:
            return True
        over = play.seconds is not None and self.clock.time - self.begun[attempt] >= play.seconds
        if over and play.step is not None:
            self.output.step = play.step
        return over


class ScriptedOutput:
    """The place of a run, whose checkpoints follow the script."""

    to, output_dir = "gs://bucket/run-1", "gs://bucket/run-1/run"

    def __init__(self) -> None:
        self.step: int | None = None
        self.files: dict[str, bytes] = {}

    def newest(self):
        return self.step

    def bring(self, hosts):
        return self.step

    def send(self, hosts):
        pass

    def write(self, name, content):
        self.files[name] = content

    def read(self, name):
        return self.files.get(name)


class Slices:
    def __init__(self, cloud: Cloud, node: int, zone: str, hours: float) -> None:
        self.cloud, self.node, self.zone, self.hours = cloud, node, zone, hours

    def create(self):
        cloud = self.cloud
        cloud.events.append(f"create {self.node} {self.zone}")
        script = cloud.node(self.node)
        if script.error is not None:
            raise script.error
        cloud.alive[self.node] = list(script.states)

    def state(self):
        cloud = self.cloud
        if self.node not in cloud.alive:
            return State(Phase.ABSENT, "NOT_FOUND")
        if self.is_lost():
            return cloud.play(max(cloud.begun)).lost
        states = cloud.alive[self.node]
        return states.pop(0) if len(states) > 0 else READY

    def is_lost(self):
        newest = max(self.cloud.begun, default=None)
        if newest is None or self.cloud.owner[newest] != self.node:
            return False
        return self.cloud.ended(newest) and self.cloud.play(newest).lost is not None

    def workers(self):
        return tuple(Worker(i, i, 0, f"run-1-{self.node}", f"10.0.0.{i}") for i in range(self.cloud.hosts))

    def guard_flags(self, of_slice):
        return ("--api=tpu", f"--node=run-1-{self.node}")

    def ssh(self, worker, argv, *, stdin=b"", seconds=120):
        cloud = self.cloud
        if self.node not in cloud.alive or self.is_lost():
            return Done(255, "", "no route to host")
        if worker.number == cloud.node(self.node).silent:
            return Done(255, "", "connection timed out")
        script = Path(argv[1]).name if argv[0] == "bash" else argv[0]
        cloud.events.append(f"{script} {worker.number} {' '.join(argv[3:4])}".rstrip())
        if script == "state.sh":
            return Done(0, json.dumps(self.state_of(worker, argv)), "")
        if script == "start.sh":
            attempt = int(argv[3])
            if cloud.play(attempt).busy:
                return Done(BUSY, "", "chips of this host are held by 77 python")
            cloud.begun.setdefault(attempt, cloud.clock.time)
            cloud.owner[attempt] = self.node
        if script == "stop.sh" and cloud.begun:
            cloud.stopped[max(cloud.begun)] = cloud.clock.time
        if script == "log.sh":
            text = cloud.play(int(argv[3])).log
            return Done(0, text[int(argv[4]) :], "")
        return Done(0, "", "")

    def state_of(self, worker, argv):
        cloud = self.cloud
        out = {"attempt": 0, "chips": 4, "disk_free": 10**12, "environment": "e", "log_bytes": 0}
        if len(argv) < 4 or int(argv[3]) not in cloud.begun:
            return out
        attempt = int(argv[3])
        play, ended = cloud.play(attempt), cloud.ended(attempt)
        exits = [75] * cloud.hosts if attempt in cloud.stopped else play.exits
        age = 5.0 if play.writes else cloud.clock.time - cloud.begun[attempt]
        return out | {
            "attempt": attempt, "alive": not ended, "exit": exits[worker.number] if ended else None, "log_age": age,
            "log_bytes": len(play.log), "last_line": play.log.strip().splitlines()[-1],
        }  # fmt: skip

    def copy(self, worker, source, target):
        self.cloud.events.append(f"copy {worker.number}")
        return Done(0, "", "")

    def fetch(self, worker, source, target):
        target.write_text("the log\n")
        return Done(0, "", "")

    def delete(self):
        cloud = self.cloud
        cloud.events.append(f"delete {self.node}")
        cloud.clock.sleep(cloud.delete_seconds)
        cloud.alive.pop(self.node, None)
