"""Where something new is written: never over what is there already."""

import os
from pathlib import Path

from jaxft.errors import ExportError


def make_new_folder(path: str | os.PathLike[str]) -> None:
    """Makes a folder. Raises ExportError if it is a file, not empty, or cannot be made."""
    target = Path(path)
    try:
        if target.exists() and not target.is_dir():
            raise ExportError(f"{target} is a file: give a new folder")
        if target.is_dir() and any(target.iterdir()):
            raise ExportError(
                f"{target} is not empty: choose a new folder, so that no file of an older export is mixed in"
            )
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(
            f"{target} cannot be made: {error.strerror or error}. Give a new folder in a place where you may write."
        ) from error


def check_new_file(path: str | os.PathLike[str]) -> None:
    """Raises ExportError if a file is there already, or its folder is none or may not be written."""
    target = Path(path)
    folder = target.absolute().parent
    if target.exists():
        raise ExportError(f"{target} is there already, and is not overwritten: choose another name, or remove it first")
    if not folder.is_dir():
        raise ExportError(f"{folder} is no folder, so {target} cannot be written: make it first")
    if not os.access(folder, os.W_OK):
        raise ExportError(f"{folder} may not be written: choose another folder for {target.name}")
