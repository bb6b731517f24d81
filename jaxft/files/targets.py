"""Where something new is written: never over what is there already, and refused before the work if it cannot be."""

import errno
import os
from pathlib import Path

from jaxft.errors import ExportError
from jaxft.files.utf8 import undecoded
from jaxft.system import REMEDIES, described

MOST_PART = 240  # bytes of one part of a path: 255 less the endings of unfinished files and folders
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
