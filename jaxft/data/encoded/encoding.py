"""A set of rows, encoded: from the cache, or made by as many processes as it deserves."""

import logging
import os
import tempfile
from pathlib import Path

from jaxft.config import DataConfig
from jaxft.data.encoded.cache import Entry, key_of, prune
from jaxft.data.encoded.pool import PART_ROWS, can_leave, encode_parts
from jaxft.data.encoded.progress import Progress
from jaxft.data.encoded.table import ExampleTable
from jaxft.data.encoded.work import NotKept, ReadCounts, Work, from_arrow, read_arrow, write_arrow
from jaxft.data.formats import ReadRow
from jaxft.data.sources import Rows
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import DataError
from jaxft.files.digest import user_cache
from jaxft.files.paths import is_remote, local_path

log = logging.getLogger(__name__)

# Fewer rows are encoded in less time than processes need to start, and `auto` does not keep them.
FEW_ROWS = 2000
MOST_PROCESSES = 32  # if `data.num_proc` is None; each needs some hundred megabytes


def encode_set(rows: Rows, config: DataConfig, tokenizer: Tokenizer, read: ReadRow) -> tuple[ExampleTable, ReadCounts]:
    """The examples of all rows, in order, and what was counted on the way.

    config: how rows are read and encoded, with its num_proc and cache. Raises DataError as `read` and `encode_all` do,
    for the first row that has an error; and if the cache cannot be used.
    """
    work = Work(rows=rows, config=config, tokenizer=tokenizer, read=read)
    folder = cache_folder(config)
    if folder is None or not len(rows) or (config.cache == "auto" and len(rows) < FEW_ROWS):
        return _in_memory(work)
    try:
        entry = Entry(folder, key_of(work))
        if (kept := entry.open()) is not None:  # without a lock, for folders that others wrote
            return kept
        with entry.lock():
            return entry.open() or _make(entry, work)
    except NotKept as error:
        if config.cache != "auto":
            raise DataError(
                f"encoded rows cannot be kept: {error}. Set data.cache to a folder with room, or to none."
            ) from error
        log.warning("encoded rows are kept in memory, and the next run makes them again: %s", error)
        return _in_memory(work)


def cache_folder(config: DataConfig) -> Path | None:
    """The folder of `data.cache`; None if there is none. Raises DataError for one that cannot be mapped."""
    if config.cache == "none":
        return None
    if config.cache == "auto":
        return user_cache() / "rows"
    if is_remote(config.cache):
        raise DataError(
            f"data.cache={config.cache!r} is not on a file system, so encoded rows cannot be mapped from there. Give a "
            "folder of this machine, or one that all of them mount."
        )
    return Path(local_path(config.cache))


def _make(entry: Entry, work: Work) -> tuple[ExampleTable, ReadCounts]:
    """Makes an entry of the cache, and opens it."""
    with entry.new() as own:
        names = [f"rows-{number:05d}.arrow" for number in range(len(_ranges(work)))]
        counts = _write(work, [own / name for name in names])
        entry.publish(own, names, counts, work.rows.describe())
    if work.config.cache == "auto":
        prune(entry.path.parent)
    encoded = entry.open()
    if encoded is None:
        raise NotKept(f"what was just written to {entry.path} cannot be read")
    return encoded


def _in_memory(work: Work) -> tuple[ExampleTable, ReadCounts]:
    ranges = _ranges(work)
    if _processes(work) == 1 or len(ranges) < 2:
        counts, batches = ReadCounts(), []
        progress = Progress(len(work.rows), work.rows.describe())
        for start, stop in ranges:
            batch, own = work.encode(start, stop)
            batches.append(batch)
            counts.add(own)
            progress.add(stop - start)
        return from_arrow(batches), counts
    with tempfile.TemporaryDirectory(prefix="jaxft-") as folder:
        paths = [Path(folder, str(number)) for number in range(len(ranges))]
        try:
            counts = _write(work, paths)
        except NotKept as error:
            raise DataError(f"{error}. Set TMPDIR to a folder with room, or data.num_proc=1.") from error
        return from_arrow(map(read_arrow, paths)), counts


def _write(work: Work, paths: list[Path]) -> ReadCounts:
    """Encodes all rows into files, one for each of `_ranges`, which are the same for any number of processes."""
    counts, ranges = ReadCounts(), _ranges(work)
    processes, progress = min(_processes(work), len(ranges)), Progress(len(work.rows), work.rows.describe())
    if processes <= 1 or not can_leave(work):
        for (start, stop), path in zip(ranges, paths, strict=True):
            batch, own = work.encode(start, stop)
            write_arrow(batch, path)
            counts.add(own)
            progress.add(stop - start)
        return counts
    parts = [(start, stop, str(path)) for (start, stop), path in zip(ranges, paths, strict=True)]
    for own in encode_parts(work, parts, processes, progress):
        counts.add(own)
    return counts


def _ranges(work: Work) -> list[tuple[int, int]]:
    count = len(work.rows)
    return [(start, min(start + PART_ROWS, count)) for start in range(0, count, PART_ROWS)]


def _processes(work: Work) -> int:
    if work.config.num_proc is not None:
        return work.config.num_proc
    if len(work.rows) < FEW_ROWS:
        return 1
    return min(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MOST_PROCESSES
    )
