"""Checksums of an export: `SHA256SUMS`, written last, in the form that `sha256sum -c` reads.

They tell accidents: a file that was cut off, lost or changed by a disk. Who changes a file can change them too.
`README.md` has none, because people write in it.
"""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxft.errors import CheckpointError
from jaxft.files.atomic import write_text

NAME = "SHA256SUMS"
FREE = {NAME, "README.md", ".jaxft_unfinished"}  # files without a checksum
THREADS = min(8, os.cpu_count() or 1)  # hashlib and file reads release the interpreter's lock
LINE = re.compile(r"([0-9a-f]{64})  ([^\0\n]+)")


def write_sums(folder: str | os.PathLike[str]) -> None:
    """Writes the SHA-256 of every file of a finished folder. Raises OSError if one cannot be read or written."""
    folder = Path(folder)
    names = _names(folder)
    with ThreadPoolExecutor(THREADS) as threads:
        digests = list(threads.map(lambda name: _digest(folder / name), names))
    write_text(folder / NAME, "".join(f"{one}  {name}\n" for one, name in zip(digests, names, strict=True)))


def has_sums(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has checksums."""
    return (Path(folder) / NAME).is_file()


def check_sums(folder: str | os.PathLike[str], *, most_bytes: int | None = None) -> list[str]:
    """What differs from the checksums of a folder, a sentence for each file; every file is read.

    most_bytes: larger files are passed over. Files without a checksum are no difference: people add some. Raises
    CheckpointError if SHA256SUMS itself is damaged.
    """
    folder = Path(folder)
    expected = {
        name: digest
        for name, digest in _read(folder).items()
        if most_bytes is None or _size(folder / name) <= most_bytes
    }
    with ThreadPoolExecutor(THREADS) as threads:
        problems = threads.map(lambda item: _problem(folder / item[0], *item), sorted(expected.items()))
        return [problem for problem in problems if problem is not None]


def _problem(path: Path, name: str, expected: str) -> str | None:
    try:
        same = _digest(path) == expected
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None if same else f"{name} is damaged or was changed: its bytes are not those that were written"


def _read(folder: Path) -> dict[str, str]:
    path = folder / NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    matches = [LINE.fullmatch(line) for line in lines]
    if not lines or None in matches:
        raise CheckpointError(f"{path} is damaged: line {matches.index(None) + 1 if lines else 1} is no checksum")
    sums = {match[2]: match[1] for match in matches if match is not None}
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in sums):
        raise CheckpointError(f"{path} is damaged: it names files outside of the folder")
    return sums


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _names(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(name for path in paths if (name := path.relative_to(folder).as_posix()) not in FREE)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
