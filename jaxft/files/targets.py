"""Where something new is written: never over what is there already, and refused before the work if it cannot be."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxft.errors import ExportError
from jaxft.files.atomic import UNFINISHED_FOLDER, publish, unfinished_folder
from jaxft.files.locks.lock import lock
from jaxft.home import local_path
from jaxft.system import REMEDIES, described, undecoded

MOST_PART = 238  # bytes of one part of a path: 255 less the endings of unfinished files and locks
SMALL_FILES = 64 * 2**20  # bytes for headers, configs and the tokenizer
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
        only_read = os.statvfs(nearest).f_flag & os.ST_RDONLY
        return f"{nearest} may not be written: {REMEDIES[errno.EROFS if only_read else errno.EACCES]}"
    return None


def refuse_address(path: str | os.PathLike[str]) -> None:
    """Raises ExportError for an address such as gs://bucket/folder, to which nothing is written."""
    if "://" in os.fspath(path):
        address = os.fspath(path)
        copy = f": gcloud storage cp --recursive OUTPUT {address}" if address.startswith("gs://") else ""
        raise ExportError(
            f"{address} is an address, and outputs are written to a local or mounted folder and read back there. Write "
            f"to a folder of this machine and copy that afterwards{copy}. Or mount the store and give the path of the "
            "mount. What a run itself exports (export.merged) into output_dir=gs://BUCKET/FOLDER is uploaded by it."
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


def begin_folder(path: str | os.PathLike[str]) -> str:
    """The empty folder in which a new folder is written, until `end_folder` gives it its name.

    It stands in the same folder; it is `path` itself where that is mounted, or its parent may not be written. What a
    killed process left there is deleted. Raises ExportError as `make_new_folder` does. Call it within `locked_output`.
    """
    target = Path(path)
    if target.is_dir() and (os.path.ismount(target) or not os.access(target.absolute().parent, os.W_OK)):
        check_new_folder(target)
        return str(target)
    make_new_folder(target)
    unfinished = unfinished_folder(target)
    try:
        _remove(unfinished)
        unfinished.mkdir()
    except OSError as error:
        raise ExportError(f"{target} cannot be made. {described(error)}") from error
    return str(unfinished)


def end_folder(unfinished: str, path: str | os.PathLike[str]) -> None:
    """Flushes a folder of `begin_folder` to the disk and gives it its name."""
    if Path(unfinished) != Path(path):
        publish(unfinished, path)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the folder in which a new folder is written: it appears whole under its name, or not at all.

    An error of the operating system says that nothing stays. Raises ExportError as `make_new_folder` does.
    """
    there = Path(path).is_dir()
    unfinished = begin_folder(path)
    try:
        yield Path(unfinished)
        end_folder(unfinished, path)
    except BaseException as error:
        remove_unfinished(unfinished, path)
        if not there:
            with contextlib.suppress(OSError):  # another program has put something there
                Path(path).rmdir()
        error.add_note(f"Nothing of {path} was kept.")
        raise


def remove_unfinished(unfinished: str, path: str | os.PathLike[str]) -> None:
    """Deletes what was written into a folder of `begin_folder`."""
    if Path(unfinished) != Path(path):
        _remove(Path(unfinished))
        return
    for entry in Path(path).iterdir():
        _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_space(path: str | os.PathLike[str], size: int, there: int = 0) -> None:
    """Raises ExportError if a disk has no room for an output.

    path: of the output. size: its bytes without small files. there: bytes that are on the disk already, and are kept
    or removed.
    """
    target = Path(os.fspath(path).removesuffix(UNFINISHED_FOLDER))
    folder = next(parent for parent in (target, *target.absolute().parents) if parent.is_dir())
    free, needed = shutil.disk_usage(folder).free, size + SMALL_FILES - there
    if needed > free:
        raise ExportError(
            f"{target} needs {needed / 1e9:.2f} GB and the disk of {folder} has {free / 1e9:.2f} GB left: make room, "
            "or choose another disk or a smaller --dtype. Nothing was written."
        )


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
