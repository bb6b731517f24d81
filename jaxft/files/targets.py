"""Where something new is written: never over what is there already, and refused before the work if it cannot be."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from jaxft.errors import ExportError
from jaxft.files.locks.lock import lock
from jaxft.home import local_path
from jaxft.system import REMEDIES, described, undecoded

MOST_PART = 238  # bytes of one part of a path: 255 less the endings of unfinished files and locks
MOST_PATH = 3800  # bytes of a whole path: 4,095 less what is made beneath it, such as the files of a checkpoint


def refused_target(path: str | os.PathLike[str]) -> str | None:
    """Why nothing can be written at a local path, and how to mend it; None if it can. Nothing is made."""
    target = Path(path).absolute()
    if (problem := undecoded(str(target))) is not None:
        return f"it {problem}: give a path in UTF-8"
    if "\0" in str(target):
        return "it has a zero byte: give another path"
    parts = [part for part in target.parts if len(os.fsencode(part)) > MOST_PART]
    if parts:
        return f"its part {parts[0][:20]}... has {len(os.fsencode(parts[0]))} bytes: at most {MOST_PART} fit"
    if len(os.fsencode(target)) > MOST_PATH:
        return (
            f"it has {len(os.fsencode(target))} bytes, and with the names of the files beneath it more than a path may "
            f"have: at most {MOST_PATH} fit"
        )
    try:
        return _refused_folder(target)
    except OSError as error:
        return described(error)


def _refused_folder(target: Path) -> str | None:
    """What is in the way of the folder that a target is in, or of the target itself if it is there."""
    nearest = next(path for path in (target, *target.parents) if os.path.lexists(path))
    if nearest.is_symlink() and not nearest.exists():
        try:
            nearest.stat()
        except FileNotFoundError:
            return (
                f"{nearest} is a link to {os.readlink(nearest)}, where nothing is: remove the link, or make its target"
            )
    if nearest != target and not nearest.is_dir():
        nearest.stat()  # says which links point at each other
        return f"{nearest} is a file, not a folder: {REMEDIES[errno.ENOTDIR]}"
    if nearest.is_dir() and not os.access(nearest, os.W_OK | os.X_OK):
        return f"{nearest} may not be written: {REMEDIES[errno.EACCES]}"
    return None


def refuse_address(path: str | os.PathLike[str]) -> None:
    """Raises ExportError for an address such as gs://bucket/folder, to which nothing is written."""
    if "://" in os.fspath(path):
        raise ExportError(
            f"{os.fspath(path)} is an address, and outputs are written to a local or mounted folder: mount the bucket "
            "and give the path of the mount, or copy the output there afterwards"
        )


@contextlib.contextmanager
def locked_output(target: str | os.PathLike[str], what: str, *, exclusive: bool = True) -> Iterator[None]:
    """Keeps other writers from an output until the block ends. what, exclusive: as for `files.locks.lock.lock`.

    Raises FolderInUseError, naming who writes there; ExportError for an address, and if it cannot be written.
    """
    refuse_address(target)
    path = Path(local_path(target))
    if (problem := refused_target(path)) is not None:
        raise ExportError(f"{target} cannot be written: {problem}")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(path, what, exclusive=exclusive))
        except OSError as error:
            # A folder that was mounted, in one that only its owner may write: that it is empty is its only lock.
            if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM) or not path.is_dir():
                raise ExportError(
                    f"{target} cannot be made. {described(error)} Give a new path in a place where you may write."
                ) from error
        yield


def make_new_folder(path: str | os.PathLike[str]) -> None:
    """Makes a folder. Raises ExportError if it is a file, not empty, or cannot be made."""
    target = Path(path)
    check_new_folder(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(
            f"{target} cannot be made. {described(error)} Give a new folder in a place where you may write."
        ) from error


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Raises ExportError if a path is a file or a folder that is not empty, or nothing can be written there."""
    target = Path(path)
    if (problem := refused_target(target)) is not None:
        raise ExportError(f"{target} cannot be written: {problem}")
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file: give a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise ExportError(f"{target} is not empty: choose a new folder, so that no file of an older export is mixed in")


def check_new_file(path: str | os.PathLike[str]) -> None:
    """Raises ExportError if a file is there already, or its folder is none or may not be written."""
    target = Path(path)
    folder = target.absolute().parent
    if (problem := refused_target(target)) is not None:
        raise ExportError(f"{target} cannot be written: {problem}")
    if target.exists():
        raise ExportError(f"{target} is there already, and is not overwritten: choose another name, or remove it first")
    if not folder.is_dir():
        raise ExportError(f"{folder} is no folder, so {target} cannot be written: make it first")
