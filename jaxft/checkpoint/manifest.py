"""Checksums of a finished folder, because Orbax restores flipped bits without an error."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxft.errors import CheckpointError, listed
from jaxft.files.atomic import unfinished_file, write_text

NAME = "manifest.json"
ALGORITHM = "blake2b"
THREADS = min(8, os.cpu_count() or 1)  # hashlib and file reads release the GIL


def write(folder: str | os.PathLike[str]) -> Path:
    """Writes `manifest.json` into a finished folder: size and checksum of every file below it.

    The manifest appears whole or not at all. Raises OSError if the disk is full.
    """
    folder = Path(folder)
    content = {"algorithm": ALGORITHM, "files": _digests(folder, _digest)}
    text = json.dumps(content | {"checksum": _own_checksum(content)}, indent=1)
    write_text(folder / NAME, text)
    return folder / NAME


def exists(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder has a manifest, so that its writing was finished."""
    return (Path(folder) / NAME).is_file()


def verify(folder: str | os.PathLike[str]) -> None:
    """Reads every file again. Raises CheckpointError naming each damaged, missing and extra file."""
    folder = Path(folder)
    expected = _read(folder)
    present = _digests(folder, _digest_or_error)
    problems = []
    for name in sorted(expected.keys() | present.keys()):
        if name not in present:
            problems.append(f"{name}: missing")
        elif name not in expected:
            problems.append(f"{name}: not in the manifest")
        elif "error" in present[name]:
            problems.append(f"{name}: cannot be read: {present[name]['error']}")
        elif present[name]["bytes"] != expected[name]["bytes"]:
            problems.append(f"{name}: {present[name]['bytes']} bytes, {expected[name]['bytes']} were written")
        elif present[name] != expected[name]:
            problems.append(f"{name}: damaged, its {expected[name]['bytes']} bytes are not those that were written")
    if problems:
        counts = f"{len(problems)} of {len(expected)} files"
        raise CheckpointError(f"{folder} differs from its manifest in {counts}:\n{listed(problems, lines=True)}")


def _read(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    path = folder / NAME
    try:
        content = json.loads(path.read_bytes())
        claimed = content.pop("checksum")
        files, algorithm = content["files"], content["algorithm"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {NAME}: writing it was interrupted") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if claimed != _own_checksum(content):
        raise CheckpointError(
            f"{path} is damaged: its text does not have the checksum {str(claimed)[:16]}... it states"
        )
    if algorithm != ALGORITHM:
        raise CheckpointError(f"{path} uses checksum {algorithm!r}; this version of jaxft reads {ALGORITHM!r} only")
    return files


def _own_checksum(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path, digest: Callable[[Path], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    unlisted = {folder / NAME, unfinished_file(folder / NAME)}
    paths = sorted(p for p in folder.rglob("*") if (p.is_symlink() or not p.is_dir()) and p not in unlisted)
    with ThreadPoolExecutor(THREADS) as pool:
        present = list(pool.map(digest, paths))
    return {p.relative_to(folder).as_posix(): d for p, d in zip(paths, present, strict=True)}


def _digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        checksum = hashlib.file_digest(file, ALGORITHM).hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "checksum": checksum}


def _digest_or_error(path: Path) -> dict[str, Any]:
    try:
        return _digest(path)
    except OSError as error:
        return {"bytes": None, "error": error.strerror}
