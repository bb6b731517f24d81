"""Checksums of a finished folder, because Orbax restores flipped bits without an error.

They show accidents. Whoever changes a file on purpose can write a manifest that fits. A folder of this machine is
summed with BLAKE2b. In a bucket, the manifest has the MD5 sums that the bucket itself states for its objects, so that
nothing is transferred to write or check it; `verify` reads both, since folders are copied in either direction.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.errors import CheckpointError, listed
from jaxft.files.atomic import unfinished_file, write_text
from jaxft.files.paths import json_object

NAME = "manifest.json"
ALGORITHM = "blake2b"
OF_BUCKETS = "md5"
THREADS = min(8, os.cpu_count() or 1)  # hashlib and file reads release the GIL
# What desktops and network file systems leave in folders that they show; nothing reads it.
OF_SYSTEMS = re.compile(r"\.DS_Store|\._.*|\.nfs.*|\.fuse_hidden.*|Thumbs\.db|desktop\.ini|\.directory|Icon\r")

Digest = dict[str, Any]  # {"bytes": ..., "checksum": ...}
Digests = Mapping[str, Mapping[str, Any]]  # by name of a file below the folder
# (folder, names of its files, algorithm) -> their digests. Raises OSError for a file that cannot be read.
Summing = Callable[[Path, Sequence[str], str], Digests]

log = logging.getLogger(__name__)


class StrayFiles(CheckpointError):
    """Files were added to a folder whose own files are whole."""


class Manifest(NamedTuple):
    """What a manifest says. algorithm: ALGORITHM or OF_BUCKETS, of the checksums of `files`."""

    algorithm: str
    files: Digests


def write(folder: str | os.PathLike[str], summing: Summing | None = None) -> Path:
    """Writes `manifest.json` into a finished folder: size and checksum of every file below it.

    The manifest appears whole or not at all. summing: by default `sums`. Raises OSError if the disk is full.
    """
    folder = Path(folder)
    digests = (summing or sums)(folder, _names_in(folder), ALGORITHM)
    digests = {name: digests[name] for name in sorted(digests)}
    write_text(folder / NAME, text_of(Manifest(ALGORITHM, digests)))
    return folder / NAME


def text_of(manifest: Manifest) -> str:
    """The text of a manifest, which `parse` reads."""
    content = {"algorithm": manifest.algorithm, "files": manifest.files}
    return json.dumps(content | {"checksum": _own_checksum(content)}, indent=1)


def exists(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder has a manifest, so that its writing was finished."""
    return (Path(folder) / NAME).is_file()


def verify(folder: str | os.PathLike[str], summing: Summing | None = None) -> None:
    """Reads every file again. Raises CheckpointError naming each damaged, missing and extra file.

    If nothing but extra files is wrong, it is StrayFiles. Files that operating systems leave in folders are ignored,
    with a warning. summing: reads the files; by default `sums`.
    """
    folder = Path(folder)
    try:
        expected = parse((folder / NAME).read_bytes(), f"{folder / NAME}")
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {NAME}: writing it was interrupted") from None
    names = _names_in(folder)
    try:
        present = (summing or sums)(folder, names, expected.algorithm)
    except OSError:  # which files it is
        present = _in_threads(folder, names, lambda path: _digest_or_error(path, expected.algorithm))
    compare(f"{folder}", expected.files, present)


def compare(folder: str, expected: Digests, present: Digests) -> None:
    """Raises CheckpointError as `verify` does if the files in a folder are not those of its manifest.

    folder: its path or address, for messages. A digest of `present` may have `error` in place of the checksum.
    """
    problems, strays = [], sorted(present.keys() - expected.keys())
    if ignored := [name for name in strays if OF_SYSTEMS.fullmatch(name.rpartition("/")[2])]:
        log.warning("%s: ignored, since the system put it there: %s", folder, listed(ignored))
        strays = [name for name in strays if name not in ignored]
    for name in sorted(expected):
        if name not in present:
            problems.append(f"{name}: missing")
        elif "error" in present[name]:
            problems.append(f"{name}: cannot be read: {present[name]['error']}")
        elif present[name]["bytes"] != expected[name]["bytes"]:
            problems.append(f"{name}: {present[name]['bytes']} bytes, {expected[name]['bytes']} were written")
        elif present[name] != expected[name]:
            problems.append(f"{name}: damaged, its {expected[name]['bytes']} bytes are not those that were written")
    if strays and not problems:
        raise StrayFiles(
            f"{folder} has files that it was not written with:\n{listed(strays, lines=True)}\nIts own files are whole. "
            f"Move these files elsewhere: {strays[0]!r} for example is {folder}/{strays[0]}"
        )
    if problems:
        problems += [f"{name}: not in the manifest" for name in strays]
        counts = f"{len(problems)} of {len(expected)} files"
        raise CheckpointError(f"{folder} differs from its manifest in {counts}:\n{listed(problems, lines=True)}")


def parse(raw: bytes, where: str) -> Manifest:
    """A manifest from its bytes. where: its path, for messages. Raises CheckpointError if it is damaged."""
    try:
        content = json_object(raw, where)
        claimed = content.pop("checksum")
        manifest = Manifest(content["algorithm"], content["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is damaged: {error}") from error
    if claimed != _own_checksum(content):
        raise CheckpointError(
            f"{where} is damaged: its text does not have the checksum {str(claimed)[:16]}... it states"
        )
    if manifest.algorithm not in (ALGORITHM, OF_BUCKETS):
        raise CheckpointError(
            f"{where} uses checksum {manifest.algorithm!r}; this version of jaxft reads {ALGORITHM!r} and "
            f"{OF_BUCKETS!r} only"
        )
    return manifest


def _own_checksum(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sums(folder: Path, names: Sequence[str], algorithm: str) -> dict[str, Digest]:
    """Size and checksum of files of a folder. Raises OSError for one that cannot be read."""
    return _in_threads(folder, names, lambda path: _digest(path, algorithm))


def readable_sums(folder: Path, names: Sequence[str], algorithm: str) -> dict[str, Digest]:
    """As `sums`, without the files that cannot be read."""
    digests = _in_threads(folder, names, lambda path: _digest_or_error(path, algorithm))
    return {name: digest for name, digest in digests.items() if "error" not in digest}


def _names_in(folder: Path) -> list[str]:
    unlisted = {folder / NAME, unfinished_file(folder / NAME)}
    paths = (p for p in folder.rglob("*") if (p.is_symlink() or not p.is_dir()) and p not in unlisted)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _in_threads(folder: Path, names: Sequence[str], digest: Callable[[Path], Digest]) -> dict[str, Digest]:
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(digest, [folder / name for name in names]), strict=True))


def _digest(path: Path, algorithm: str) -> Digest:
    with open(path, "rb") as file:
        # MD5 is no protection here either, so systems that forbid it as one may allow it.
        checksum = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "checksum": checksum}


def _digest_or_error(path: Path, algorithm: str) -> Digest:
    try:
        return _digest(path, algorithm)
    except OSError as error:
        return {"bytes": None, "error": error.strerror}
