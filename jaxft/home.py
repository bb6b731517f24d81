"""Paths as users write them: `~` is the home folder."""

import os


def local_path(path: str | os.PathLike[str]) -> str:
    """The path with `~` and `~user` replaced by home folders; an address and an `hf://` name as they are.

    Every path that users give goes through it, in a config, an option of a command or an argument of a function.
    """
    path = os.fspath(path)
    try:
        return path if "://" in path else os.path.expanduser(path)
    except ValueError:  # `~` before a zero byte or half of a character: no user has such a name
        return path
