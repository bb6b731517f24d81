"""Folders for working copies below TMPDIR, which go with their process. What a killed one left goes with the next."""

import atexit
import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "jaxft-run-"
NEW_SECONDS = 60.0  # in which a folder may be made and not be locked yet


class Scratch:
    """A new folder, locked by this process until `remove`, or until the process ends in whichever way."""

    def __init__(self) -> None:
        _remove_abandoned()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._descriptor: int | None = os.open(self.path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # of a file system without locks, where others cannot take it either
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        atexit.register(self.remove)

    def remove(self) -> None:
        """Deletes the folder."""
        if self._descriptor is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._descriptor)
            self._descriptor = None
            atexit.unregister(self.remove)


def _remove_abandoned() -> None:
    """Deletes the folders that no process has locked."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # of another user, just gone, or locked
            if time.time() - folder.stat().st_mtime < NEW_SECONDS:
                continue
            descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
