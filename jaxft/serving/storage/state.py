"""The state folder: its lock, its database, and where files, models and jobs are."""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jaxft.files.atomic import make_folder
from jaxft.files.locks.lock import lock
from jaxft.files.locks.owner import is_of_one_machine
from jaxft.serving.storage.database import Database, StateError
from jaxft.serving.storage.uses import Uses

DATABASE = "state.sqlite3"
SPARE_BYTES = 256 * 2**20  # of the disk, which uploads leave free for the database and for checkpoints
PARTIAL = ".partial"  # ending of what is being written


def new_id(prefix: str) -> str:
    """An id of 128 random bits, such as `file-...`."""
    return prefix + secrets.token_hex(16)


def now() -> int:
    """Seconds since 1970. Lists are ordered by counters, since a clock may be set back."""
    return int(time.time())


@dataclass(frozen=True)
class State:
    """An open state folder. uses: of the folders of models."""

    folder: Path
    db: Database = field(repr=False)
    uses: Uses = field(default_factory=Uses, repr=False)

    @property
    def files(self) -> Path:
        """Uploaded files and results, by id."""
        return self.folder / "files"

    @property
    def uploads(self) -> Path:
        """Parts of unfinished uploads, in a folder for each."""
        return self.folder / "uploads"

    @property
    def models(self) -> Path:
        """Folders of tuned models."""
        return self.folder / "models"

    @property
    def jobs(self) -> Path:
        """Folders of jobs, by id."""
        return self.folder / "jobs"

    @property
    def engines(self) -> Path:
        """Logs of engines, and what is compiled for them."""
        return self.folder / "engines"

    def free_bytes(self) -> int:
        """What uploads may still take of the disk."""
        return shutil.disk_usage(self.folder).free - SPARE_BYTES


@contextlib.contextmanager
def open_state(folder: str | os.PathLike[str], *, what: str = "jaxft serve", exclusive: bool = True) -> Iterator[State]:
    """Opens a state folder, and makes it if it is not there.

    what: who has it, for the message that others get. exclusive: keeps other servers from it; False is for short
    commands beside a server. Raises FolderInUseError, naming the other server, and StateError for a folder on a network
    file system, for one that holds something else, and for a database that cannot be used.
    """
    path = Path(folder).absolute()
    if path.exists() and not path.is_dir():
        raise StateError(f"{path} is a file. Give a folder as --state.")
    there = sorted(one.name for one in path.iterdir()) if path.is_dir() else []
    if there and DATABASE not in there and set(there) - {"jaxft_lock.json"}:
        raise StateError(f"{path} holds something else ({there[0]}). Give a new folder as --state.")
    make_folder(path)
    path.chmod(0o700)  # rows of users, and hashes of keys
    if not is_of_one_machine(path):
        raise StateError(
            f"{path} is on a network file system, and the database needs memory that its processes share. Give a "
            "folder on a disk of this machine as --state."
        )
    with contextlib.ExitStack() as stack:
        if exclusive:
            stack.enter_context(lock(path, what, inside=True))
        state = State(path, Database(path / DATABASE))
        stack.callback(state.db.close)
        for part in (state.files, state.uploads, state.models, state.jobs, state.engines):
            make_folder(part)
        yield state
