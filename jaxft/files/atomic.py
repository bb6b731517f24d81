"""Atomic writes: a file or a folder is written under another name, flushed to disk and then renamed.

After a kill, a full disk, a crash of the machine or a power cut, either the old content is there or all of the new
content. A rename may reach the disk before the bytes that it names, and a file before the folder entry that leads to
it, so both are flushed, in this order. The other name has `jaxft` in it: what an interrupted write left under it is
deleted, so it is none that a user or another program would choose.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from jaxft.system import naming

FilePath = str | os.PathLike[str]

UNFINISHED_FILE, UNFINISHED_FOLDER = ".jaxft.tmp", ".jaxft.partial"  # endings of what is being written

# What fsync answers where a file system has nothing to flush, or cannot flush a folder, as some mounted buckets.
CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def unfinished_file(path: FilePath) -> Path:
    """The name under which `write_file` writes: that of the file with UNFINISHED_FILE appended, in the same folder."""
    return Path(f"{os.fspath(path)}{UNFINISHED_FILE}")


def unfinished_folder(path: FilePath) -> Path:
    """The name under which a folder, or an output that needs one, is written: the target's with UNFINISHED_FOLDER."""
    return Path(path).with_name(f"{Path(path).name}{UNFINISHED_FOLDER}")


def write_file(path: FilePath, fill: Callable[[BinaryIO], object]) -> None:
    """Writes a file by calling `fill` with it, opened for bytes. The file appears whole, or the old one stays.

    A link at `path` is replaced, not followed. Raises whatever `fill` raises, and OSError, with the name of the file,
    if the disk is full; the unfinished file is then removed.
    """
    unfinished = unfinished_file(path)
    try:
        with naming(path), _open_new(unfinished) as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        _rename(unfinished, Path(path))
    finally:
        with contextlib.suppress(OSError):  # it would hide the first error
            unfinished.unlink(missing_ok=True)


def _open_new(path: Path) -> BinaryIO:
    """A file that did not exist, opened for bytes: no link that somebody put there is followed."""
    path.unlink(missing_ok=True)  # what a killed process left
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb")


def write_text(path: FilePath, text: str) -> None:
    """Writes text in UTF-8, as `write_file` does."""
    write_file(path, lambda file: file.write(text.encode()))


def make_folder(path: FilePath) -> None:
    """Makes a folder and its parents, unless they are there, and flushes the entries of those that were made."""
    absent = []
    at = Path(path).absolute()
    while not at.is_dir():
        absent.append(at)
        at = at.parent
    Path(path).mkdir(parents=True, exist_ok=True)
    for folder in reversed(absent):
        flush(folder.parent)


@contextlib.contextmanager
def new_folder(path: FilePath) -> Iterator[Path]:
    """Yields an empty folder that takes the name `path` when the block ends, and is removed if the block raises.

    What an earlier call left unfinished is removed first; missing parent folders are made. Raises OSError if `path` is
    a folder with files in it.
    """
    unfinished = unfinished_folder(path)
    shutil.rmtree(unfinished, ignore_errors=True)
    make_folder(unfinished)
    try:
        yield unfinished
        publish(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def publish(unfinished: FilePath, path: FilePath) -> None:
    """Flushes a finished file or folder to disk and renames it to `path`, which is absent, a file or an empty folder.

    Both names are on one file system.
    """
    flush_tree(unfinished)
    _rename(Path(unfinished), Path(path))


def flush_tree(path: FilePath) -> None:
    """Flushes a file, or a folder and all files and folders below it. Links are not followed."""
    path = Path(path)
    for entry in (*path.rglob("*"), path):
        if not entry.is_symlink():
            flush(entry)


def flush(path: FilePath) -> None:
    """Flushes a file, or the entries of a folder, to the disk. Raises OSError, with the path, if the disk refuses."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            error.filename = os.fspath(path)
            raise
    finally:
        os.close(descriptor)


def _rename(source: Path, target: Path) -> None:
    os.replace(source, target)
    flush(target.parent)  # so that the new name outlives a crash of the machine
