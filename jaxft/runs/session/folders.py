"""The folders that a `Session` writes, which stay its process's as long as it lives."""

import contextlib
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from jaxft.config import RunConfig
from jaxft.errors import ConfigError
from jaxft.files.locks import lock
from jaxft.files.targets import locked_output, whole_folder
from jaxft.home import local_path
from jaxft.runs.folder import locked_run, open_run
from jaxft.runs.identity.contents import Reads
from jaxft.sharding.processes import on_primary

WHAT = "jaxft.Session"


class SessionFolders:
    """The run folders of a session. Other processes are kept from them until this object is deleted."""

    def __init__(self) -> None:
        self._paths: set[Path] = set()
        self._locks = contextlib.ExitStack()
        weakref.finalize(self, self._locks.close)

    def open(self, folder: Path, config: RunConfig, reads: Reads, template: str | None) -> None:
        """Makes a run folder of a path, or refuses it, as for a whole run. Every process of the run calls it.

        Raises FolderInUseError if another process writes there, and as `open_run` does.
        """
        with contextlib.ExitStack() as stack:
            if (path := folder.absolute()) not in self._paths:
                stack.enter_context(locked_run(folder, WHAT, exclusive=False))
            on_primary(partial(lock.check, folder, inside=True))
            on_primary(partial(open_run, config, reads=reads, template=template, folder=folder))
            self._paths.add(path)
            self._locks.push(stack.pop_all())


def folder_of_state(folder: str) -> Path:
    """The folder to which the state of a session is written. Raises ConfigError for an address."""
    if "://" in folder:
        raise ConfigError(
            f"{folder} is an address, and a session writes its state to a local or mounted folder: give one, and copy "
            "it with `gcloud storage cp --recursive`. load_state reads it at gs:// too."
        )
    return Path(local_path(folder))


@contextlib.contextmanager
def new_export(folder: str) -> Iterator[Path]:
    """Yields where an export is written: it appears whole as `folder`, or not at all. Other writers are kept from it.

    Every process of the run calls it. Raises FolderInUseError, and ExportError if it is not new.
    """
    with contextlib.ExitStack() as stack:

        def begin() -> str:
            stack.enter_context(locked_output(folder, WHAT))
            return str(stack.enter_context(whole_folder(local_path(folder))))

        yield Path(on_primary(begin))
        on_primary(stack.close)  # the others wait until it has its name
