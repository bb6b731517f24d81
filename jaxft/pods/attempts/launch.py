"""launch.json: all that is known of a run on Google Cloud, written before each effect outside this machine.

Whoever reads it after a kill at any moment knows each name that may exist in the cloud, so that nothing is created
twice and nothing is forgotten.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxft.errors import CheckpointError, PodError
from jaxft.files.atomic import make_folder, write_text
from jaxft.files.strict_json import parse_json
from jaxft.home import local_path

HOME = "~/.jaxft/pods"  # a folder for each run
NAME = "launch.json"
FORM = 1  # of the file

log = logging.getLogger(__name__)


@dataclass
class Node:
    """The machines of one creation. number: from 1. Times: Unix seconds, None for what has not happened.

    requested: when their creation was first requested. ready: when every host could be reached. deleted: when nothing
    of them was left.
    """

    number: int
    zone: str
    requested: float
    ready: float | None = None
    deleted: float | None = None
    raw: str = ""  # the last state in the words of the API

    def hours(self, now: float) -> float:
        """Hours in which the machines existed, until `now` if they still do."""
        if self.ready is None:
            return 0.0
        return max(0.0, (now if self.deleted is None else self.deleted) - self.ready) / 3600


@dataclass
class Attempt:
    """One start of training on all hosts. number: from 1. node: the number of its node.

    began: when the first host was set up for it. started: when training was first told to start. exits: the exit code
    of each worker at the end. end: the value of an `End`. step_before, step_after: the newest whole checkpoint before
    and after. handled: whether what follows its end was done, so that the next attempt may begin.
    """

    number: int
    node: int
    began: float
    started: float | None = None
    ended: float | None = None
    exits: list[int | None] = field(default_factory=list)
    end: str | None = None
    step_before: int | None = None
    step_after: int | None = None
    handled: bool = False

    @property
    def progress(self) -> bool:
        """Whether the newest whole checkpoint is newer than at the start."""
        return (self.step_after or 0) > (self.step_before or 0)


@dataclass
class Launch:
    """A run. request: as `Request.to_json` gives it. archive: the name of what is carried to the hosts. config: a
    digest of the resolved config.

    state: `open`, or how the run ended: an `End`'s value, or `deleted`. message: for the user, about the end.
    hour_usd: the price of all machines in an hour. fetched: whether a complete run was brought home from a host's disk.
    closed_attempts: the attempts before the run was last taken up after an end.
    """

    name: str
    request: dict[str, Any]
    archive: str
    config: str
    hour_usd: float
    created: float
    state: str = "open"
    message: str = ""
    fetched: bool = False
    closed_attempts: int = 0
    nodes: list[Node] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def node(self) -> Node | None:
        """The machines that exist or may exist, or None."""
        return self.nodes[-1] if self.nodes and self.nodes[-1].deleted is None else None

    @property
    def attempt(self) -> Attempt | None:
        """The attempt that has not ended, or None."""
        return self.attempts[-1] if self.attempts and self.attempts[-1].end is None else None

    def reopen(self) -> None:
        """Goes on with a run that had ended: its attempts no longer count against --retries."""
        self.state, self.message, self.closed_attempts = "open", "", len(self.attempts)

    def hours(self, now: float) -> float:
        """Hours in which machines existed, in all attempts together."""
        return sum(node.hours(now) for node in self.nodes)

    def usd(self, now: float) -> float:
        """USD spent on the machines by the list price."""
        return self.hours(now) * self.hour_usd

    def idle(self) -> int:
        """The attempts in a row, up to the last that ended, that brought no newer checkpoint."""
        ended = [attempt for attempt in self.attempts[self.closed_attempts :] if attempt.end is not None]
        count = 0
        for attempt in reversed(ended):
            if attempt.progress:
                break
            count += 1
        return count

    def to_text(self) -> str:
        """The text of the file."""
        values = dataclasses.asdict(self) | {"form": FORM}
        for entry in (values, *values["nodes"], *values["attempts"]):
            for key in TIMES & entry.keys():
                entry[key] = None if entry[key] is None else datetime.fromtimestamp(entry[key], UTC).isoformat()
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_text(cls, text: str, source: str) -> "Launch":
        """The launch of which `to_text` made the text. Raises CheckpointError, with `source`, if it is damaged."""
        try:
            values = parse_json(text)
            if values.pop("form") != FORM:
                raise CheckpointError(
                    f"{source} is of another version of jaxft: use that version, or delete what it made with "
                    "`jaxft pod "
                    "list` and `jaxft pod delete`"
                )
            nodes = [Node(**_with_times(node)) for node in values.pop("nodes")]
            attempts = [Attempt(**_with_times(attempt)) for attempt in values.pop("attempts")]
            return cls(**_with_times(values), nodes=nodes, attempts=attempts)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{source} is damaged: {error}. `jaxft pod list` shows what exists, `jaxft pod delete NAME` "
                "deletes it; "
                "then move the file away, and give the command again: the checkpoints are not touched."
            ) from error


TIMES = {"created", "requested", "ready", "deleted", "began", "started", "ended"}


def _with_times(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: datetime.fromisoformat(value).timestamp() if key in TIMES and value is not None else value
        for key, value in values.items()
    }


@dataclass
class Records:
    """Where the launch of a run is kept: a folder of this machine, and a copy where the run goes.

    folder: of the run. copy: writes the text beside the run; its errors are told and end nothing.
    """

    folder: Path
    copy: Callable[[str], None] = lambda text: None

    def save(self, launch: Launch) -> None:
        """Writes launch.json. A kill leaves the old file or the new one."""
        text = launch.to_text()
        make_folder(self.folder)
        write_text(self.folder / NAME, text)
        self.copy(text)

    def read(self) -> Launch | None:
        """The launch, or None if there is none. Raises CheckpointError if it is damaged."""
        path = self.folder / NAME
        try:
            return Launch.from_text(path.read_text(encoding="utf-8"), str(path))
        except FileNotFoundError:
            return None

    def wish(self) -> str | None:
        """What another command has requested of the process that follows the run: `stop`, `delete` or None."""
        try:
            return (self.folder / "wish").read_text(encoding="utf-8").strip() or None
        except FileNotFoundError:
            return None

    def set_wish(self, wish: str | None) -> None:
        """Requests something of the process that follows the run; None takes it back."""
        if wish is None:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / "wish").unlink()
        else:
            write_text(self.folder / "wish", wish + "\n")


def folder_of(name: str) -> Path:
    """The folder of this machine that keeps the launch of a run."""
    return Path(local_path(HOME)) / name


def opened(name: str) -> Launch:
    """The launch of a run. Raises PodError, with the names that exist, if this machine knows of none."""
    launch = Records(folder_of(name)).read()
    if launch is None:
        known = sorted(path.parent.name for path in Path(local_path(HOME)).glob(f"*/{NAME}"))
        names = f"It knows {', '.join(known)}. " if known else ""
        raise PodError(
            f"this machine has no record of a run {name!r}. {names}`jaxft pod list --project=P` shows what exists in a "
            "project; if another machine began the run, the same `jaxft pod run` takes it up here"
        )
    return launch
