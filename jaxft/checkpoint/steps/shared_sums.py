"""Checksums of the files of a step, which all processes of a run compute: each file is read by one of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import jax

from jaxft.checkpoint import manifest
from jaxft.sharding.processes import KeyValueStore, is_multi_process, store

WAIT_MS = 3600 * 1000  # for another process to read its files; a process that died is noticed long before


class SharedSums:
    """Process 0 asks the others for checksums, at most once until the block ends, after which they wait no longer.

    key: of these checksums, the same in all processes and never used again. root: a folder that all processes see, if
    under other paths, and in which the files are. The others call `help_with`.
    """

    def __init__(self, key: str, root: str | Path) -> None:
        self._key, self._root, self._requested = f"jaxft/sums/{key}", Path(root), not is_multi_process()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._requested:
            store().key_value_set(self._key, json.dumps(None))

    def sums(self, folder: Path, names: Sequence[str], algorithm: str) -> dict[str, manifest.Digest]:
        """The checksums of files of a folder below the root. Raises OSError for one that cannot be read."""
        if self._requested:
            return manifest.sums(folder, names, algorithm)
        self._requested = True
        parts = shares(folder, names, jax.process_count())
        return sums_of_all(store(), self._key, parts, folder, folder.relative_to(self._root), algorithm)


def help_with(key: str, root: str | Path) -> None:
    """Computes this process's part of the checksums that process 0 asks for; nothing if it asks for none."""
    answer(store(), f"jaxft/sums/{key}", Path(root), jax.process_index())


def sums_of_all(
    values: KeyValueStore, key: str, parts: Sequence[Sequence[str]], folder: Path, within: Path, algorithm: str
) -> dict[str, manifest.Digest]:
    """As `SharedSums.sums`, in process 0. parts: the files of each process. within: the folder, from the root.

    What another process cannot read is read here.
    """
    values.key_value_set(key, json.dumps({"within": within.as_posix(), "algorithm": algorithm, "parts": parts}))
    digests = manifest.sums(folder, parts[0], algorithm)
    for index in range(1, len(parts)):
        digests |= json.loads(values.blocking_key_value_get(f"{key}/{index}", WAIT_MS))
    left = [name for part in parts for name in part if name not in digests]
    return digests | manifest.sums(folder, left, algorithm)


def answer(values: KeyValueStore, key: str, root: Path, me: int) -> None:
    """As `help_with`, in process `me`."""
    request = json.loads(values.blocking_key_value_get(key, WAIT_MS))
    if request is None:
        return
    digests = manifest.readable_sums(root / request["within"], request["parts"][me], request["algorithm"])
    values.key_value_set(f"{key}/{me}", json.dumps(digests))


def shares(folder: Path, names: Sequence[str], count: int) -> list[list[str]]:
    """The files of each of `count` processes: the largest first, each to the process with fewest bytes so far."""
    sizes = {name: _size(folder / name) for name in names}
    parts: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(names, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        parts[least].append(name)
        loads[least] += sizes[name] + 1
    return parts


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it is reported when it is read
        return 0
