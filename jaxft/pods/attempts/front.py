"""The process that leads a run from its creation to its deletion, and what it needs of the world outside."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from jaxft.errors import PodError
from jaxft.pods import command
from jaxft.pods.attempts.hosts import THREADS, Hosts
from jaxft.pods.attempts.launch import Launch, Node, Records
from jaxft.pods.attempts.outputs import Output
from jaxft.pods.command import Run
from jaxft.pods.request import Request
from jaxft.pods.slices import Slices

COORDINATOR_PORT = 8476  # 8482, JAX's own since 0.8.1, is closed in the firewall rules that Google Cloud makes


class MakeSlices(Protocol):
    """The slices of one node. No call is made by itself."""

    def __call__(
        self, request: Request, *, attempt: int, zone: str, hours: float, run: Run, sleep: Callable[[float], None]
    ) -> Slices:
        """attempt: the number of the node in this run. hours: after which Google may delete it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outside:
    """The world outside a front: tests replace its parts.

    say: shows one line. now: Unix seconds. sleep: waits so many seconds. slices_of: makes the slices of a node. ask:
    asks a question at a terminal, None without one. platform: on which training is told to insist. port: of the
    coordinator. poll_seconds: between two looks at the hosts.
    """

    say: Callable[[str], None]
    slices_of: MakeSlices
    run: Run = command.run
    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    ask: Callable[[str], str] | None = None
    platform: str = "tpu"
    port: int = COORDINATOR_PORT
    poll_seconds: float = 15.0


@dataclass(kw_only=True)
class Front:
    """request, launch: of the run. records: where the launch is kept. output: where the run goes. archive: what is
    carried to the hosts. secrets: environment variables for the hosts, which are nowhere written here.
    """

    request: Request
    launch: Launch
    records: Records
    output: Output
    archive: Path
    outside: Outside
    secrets: Mapping[str, str] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """Shows one line."""
        self.outside.say(text)

    def save(self) -> None:
        """Writes launch.json."""
        self.records.save(self.launch)

    def now(self) -> float:
        """Unix seconds."""
        return self.outside.now()

    def hours_left(self) -> float:
        """Hours of --max_hours in which machines may still exist."""
        return max(0.0, self.request.max_hours - self.launch.hours(self.now()))

    def slices(self, node: Node) -> Slices:
        """The slices of a node of this run."""
        hours = self.request.max_hours - sum(
            other.hours(self.now()) for other in self.launch.nodes if other is not node
        )
        return self.outside.slices_of(
            self.request, attempt=node.number, zone=node.zone, hours=hours, run=self.outside.run,
            sleep=self.outside.sleep,
        )  # fmt: skip

    def hosts(self, slices: Slices) -> Hosts:
        """All hosts of slices that are ready."""
        # On paper one host after the other, so that the commands stand in an order.
        threads = 1 if self.request.dry_run else THREADS
        return Hosts(slices, slices.workers(), self.launch.name, self.outside.sleep, threads)

    def bring(self, hosts: Hosts) -> int | None:
        """Brings home what is new on the hosts. Returns the newest whole checkpoint; a failure is told, and None."""
        try:
            return self.output.bring(hosts)
        except (PodError, OSError) as error:
            self.say(f"not brought home now: {error}")
            return None

    def wished(self) -> str | None:
        """`stop` or `delete`, if another command has requested it."""
        return self.records.wish()
