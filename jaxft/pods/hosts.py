"""How gcloud reaches a host, and what the slices of both APIs of Google Cloud have in common."""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxft.pods.command import Done
from jaxft.pods.gcloud import Gcloud
from jaxft.pods.request import Request
from jaxft.pods.slices import Worker

COPY_SECONDS = 3600.0  # for one file
# A connection that is not made in half a minute, or is silent for a minute, ends; the caller repeats.
CONNECTION = ("-oConnectTimeout=30", "-oServerAliveInterval=15", "-oServerAliveCountMax=4")


@dataclass(frozen=True)
class Reach:
    """words: gcloud's words before ssh and scp. by_number: whether a host is a number of its node, and not a name."""

    gcloud: Gcloud
    words: tuple[str, ...]
    zone: str
    by_number: bool
    internal_ip: bool
    iap: bool

    def run(self, worker: Worker, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` on a host."""
        flags = [*self._flags(worker), *(f"--ssh-flag={flag}" for flag in CONNECTION)]
        return self.gcloud.argv([*self._words, "ssh", worker.node], [*flags, f"--command={shlex.join(argv)}"])

    def copy(self, worker: Worker, source: Path, target: str) -> list[str]:
        """The command that copies a file of this machine to a host."""
        return self._scp(worker, [str(source), f"{worker.node}:{target}"])

    def fetch(self, worker: Worker, source: str, target: Path) -> list[str]:
        """The command that copies a file of a host to this machine."""
        return self._scp(worker, [f"{worker.node}:{source}", str(target)])

    def _scp(self, worker: Worker, ends: list[str]) -> list[str]:
        flags = [*self._flags(worker), *(f"--scp-flag={flag}" for flag in CONNECTION)]
        return self.gcloud.argv([*self._words, "scp", *ends], flags)

    @property
    def where(self) -> tuple[str, ...]:
        """The flags that name zone and project, if the latter is known."""
        project = () if self.gcloud.project is None else (f"--project={self.gcloud.project}",)
        return (f"--zone={self.zone}", *project)

    @property
    def _words(self) -> list[str]:
        # The Cloud TPU commands know this tunnel only in their alpha form.
        return [*(["alpha"] if self.by_number and self.iap else []), *self.words]

    def _flags(self, worker: Worker) -> list[str]:
        flags = [f"--zone={self.zone}", *([f"--worker={worker.host}"] if self.by_number else [])]
        return flags + (["--internal-ip"] if self.internal_ip else ["--tunnel-through-iap"] if self.iap else [])


@dataclass(frozen=True)
class GoogleSlices:
    """What the slices of both APIs have in common: their names, and how single hosts are reached.

    node: the name of this creation. zone: where. hours: after which Google deletes the machines where it can. sleep:
    waits so many seconds.
    """

    gcloud: Gcloud
    reach: Reach
    request: Request
    node: str
    zone: str
    hours: float
    sleep: Callable[[float], None] = time.sleep

    @property
    def names(self) -> list[str]:
        """One name for each slice: of its node, its instance or its group."""
        if self.request.slices == 1:
            return [self.node]
        return [f"{self.node}-{number}" for number in range(self.request.slices)]

    def ssh(self, worker: Worker, argv: Sequence[str], *, stdin: bytes = b"", seconds: float = 120) -> Done:
        """See Slices."""
        return self.gcloud.run(self.reach.run(worker, argv), stdin=stdin, seconds=seconds)

    def copy(self, worker: Worker, source: Path, target: str) -> Done:
        """See Slices."""
        return self.gcloud.run(self.reach.copy(worker, source, target), seconds=COPY_SECONDS)

    def fetch(self, worker: Worker, source: str, target: Path) -> Done:
        """See Slices."""
        return self.gcloud.run(self.reach.fetch(worker, source, target), seconds=COPY_SECONDS)
