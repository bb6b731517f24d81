"""What the two APIs of Google Cloud have in common: the slices of one attempt, their state and their hosts."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from jaxft.pods.command import Done


class Phase(Enum):
    """The state of all slices of an attempt together; the worst of them decides."""

    ABSENT = "absent"  # nothing of that name is there
    WAITING = "waiting"  # in a queue
    CREATING = "creating"
    READY = "ready"  # every host can be reached
    LOST = "lost"  # preempted, stopped, under repair or maintenance: it must be deleted and created again
    REFUSED = "refused"  # the request failed: no capacity, no quota
    DELETING = "deleting"


@dataclass(frozen=True)
class State:
    """phase: as above. raw: the words of the API, such as PREEMPTED. message: what it says of it, or an empty string.

    maintenance: when maintenance is announced, as the API writes it, or None.
    """

    phase: Phase
    raw: str
    message: str = ""
    maintenance: str | None = None


@dataclass(frozen=True)
class Worker:
    """A host of a slice.

    number: its process, counted over all slices, slice by slice. slice: the number of its slice. host: its number in
    the slice. node: the name by which gcloud reaches it. address: its internal address, where other workers reach it.
    """

    number: int
    slice: int
    host: int
    node: str
    address: str


class Slices(Protocol):
    """The slices of one attempt. Each method can be called again after a failure in its middle."""

    def create(self) -> None:
        """Asks for the slices and returns; they may not be there for hours. Raises PodError with the API's message."""
        ...

    def state(self) -> State:
        """The state now. A state that the API does not tell at the moment raises PodError."""
        ...

    def workers(self) -> tuple[Worker, ...]:
        """Every host, in the order of the process numbers. Only for slices that are READY."""
        ...

    def ssh(self, worker: Worker, argv: Sequence[str], *, stdin: bytes = b"", seconds: float = 120) -> Done:
        """Runs a command on one host. gcloud may run it more than once: it must be safe to repeat."""
        ...

    def copy(self, worker: Worker, source: Path, target: str) -> Done:
        """Copies a file of this machine to a path on one host, below the home folder there if it is relative."""
        ...

    def fetch(self, worker: Worker, source: str, target: Path) -> Done:
        """Copies a file of one host, below the home folder there if `source` is relative, to a path of this machine."""
        ...

    def guard_flags(self, of_slice: int) -> tuple[str, ...]:
        """The options by which guard.sh of tpu_scripts/worker, on a host of this slice, deletes all slices."""
        ...

    def delete(self) -> None:
        """Deletes all that was made for the attempt, and returns once the API no longer knows of it."""
        ...
