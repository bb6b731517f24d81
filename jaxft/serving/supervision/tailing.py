"""A file of lines that another process appends to, or replaces."""

import os
from pathlib import Path


class Tail:
    """Reads what is new in a file. One that was replaced, or has become shorter, is read from its start again."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._inode = path, 0, -1

    @property
    def position(self) -> tuple[int, int]:
        """Up to where it has read; set to an earlier one, that is read again."""
        return self._inode, self._offset

    @position.setter
    def position(self, position: tuple[int, int]) -> None:
        self._inode, self._offset = position

    def lines(self) -> list[bytes]:
        """The whole lines since the last call; none if there is no file."""
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content.rfind(b"\n") + 1
        self._offset += whole
        return content[:whole].splitlines()
