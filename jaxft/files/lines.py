"""A file of lines that grows while a run works, and keeps in memory what the disk does not take."""

import contextlib
import os
from collections.abc import Callable, Sequence

from jaxft.files.atomic import FilePath


class LineFile:
    """Appends lines to a file, each of which is with the operating system when `add` returns, so that it outlives a
    SIGKILL of this process.

    If the disk is full or fails, the lines wait in memory and are written, in order, with the first later call that can
    write. The file never holds a part of a line before a whole one. say: told once when lines begin to wait, once when
    they have been written, and at the end if they have not. Raises OSError if the file cannot be opened at first.
    """

    def __init__(self, path: FilePath, say: Callable[[str], None]) -> None:
        self._path, self._say = os.fspath(path), say
        self._name = os.path.basename(self._path)
        self._waiting: list[bytes] = []
        self._late = 0  # lines that the disk has not taken at first
        self._file: int | None = self._open()
        self._torn: int | None = None  # the size up to the last whole line, after a write that failed
        self._closed = False

    @property
    def waiting(self) -> tuple[str, ...]:
        """The lines that are in memory alone."""
        return tuple(line.decode() for line in self._waiting)

    def add(self, lines: Sequence[str]) -> None:
        """Appends lines, each of which ends in a newline. Raises ValueError after `close`."""
        if self._closed:
            raise ValueError(f"{self._path} is a closed file")
        self._waiting += [line.encode() for line in lines]
        self.flush()

    def flush(self) -> None:
        """Tries to write the lines that wait."""
        if not self._waiting:
            return
        try:
            self._write()
        except OSError as error:
            self._abandon()
            if not self._late:
                self._say(
                    f"warning: {self._path} cannot be written ({error.strerror}). The run goes on; the lines wait in "
                    "memory and are written when it can be"
                )
            self._late = max(self._late, len(self._waiting))
            return
        if self._late:
            self._say(f"{self._name} is written again: no line is missing, {self._late} were late")
        self._late = 0

    def close(self) -> None:
        """Tries for the last time, and says how many lines are lost; harmless when called again."""
        if self._closed:
            return
        self.flush()
        if self._waiting:
            self._say(f"warning: {self._path} lacks the last {len(self._waiting)} lines, which could not be written")
        self._closed = True
        self._abandon()

    def _write(self) -> None:
        if self._file is None:
            self._file = self._open()
        if self._torn is None:
            self._torn = os.fstat(self._file).st_size
        else:
            os.ftruncate(self._file, self._torn)  # a full disk takes a part of a line
        left = memoryview(b"".join(self._waiting))
        while left:
            left = left[os.write(self._file, left) :]
        self._torn, self._waiting = None, []

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _abandon(self) -> None:
        """Closes the file: another descriptor may work where this one does not, as on a network's file system."""
        if self._file is not None:
            if self._torn is not None:
                with contextlib.suppress(OSError):  # whoever reads ignores a part of a line at the end
                    os.ftruncate(self._file, self._torn)
            with contextlib.suppress(OSError):
                os.close(self._file)
        self._file = None
