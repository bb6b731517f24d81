"""Paths without the characters that a library below takes for a pattern, or for another syntax.

Orbax looks for its files by `glob`, to which `[1]` is a set of characters, and TensorStore takes a backslash for a
slash. A folder with such a name, or below one, is handed to them under another name: the entry of /proc that belongs to
the opened folder.
"""

import os
import re
import weakref
from pathlib import Path

from jaxft.errors import CheckpointError

SPECIAL = re.compile(r"[\[\]*?{}\\|%#]")
PROC = Path("/proc/self/fd")


class PlainFolder:
    """A folder, and a path to it that every library reads as it is; good as long as this object lives.

    path: the folder's own path, if it has none of the characters. Raises CheckpointError as `check_path` does, and
    OSError if the folder is needed under another name and cannot be opened.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).absolute()
        self.path = self.folder
        if SPECIAL.search(str(self.folder)):
            check_path(self.folder)
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            weakref.finalize(self, os.close, descriptor)
            self.path = PROC / str(descriptor)

    def own_names(self, text: str) -> str:
        """A message of such a library, with the folder's own path in it."""
        return text if self.path == self.folder else text.replace(str(self.path), str(self.folder))


def check_path(folder: str | os.PathLike[str]) -> None:
    """Raises CheckpointError for a path that would need another name on a system that has no /proc."""
    special = sorted(set(SPECIAL.findall(str(Path(folder).absolute()))))
    if special and not PROC.is_dir():
        raise CheckpointError(
            f"{Path(folder).absolute()} has {' '.join(special)} in its path, which the library that writes arrays "
            "takes for a pattern, and this system has no /proc under which to give it another name. Choose a folder "
            "whose path has none of these characters."
        )
