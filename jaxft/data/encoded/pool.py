"""Several processes that encode the parts of a set and write them to files."""

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

from jaxft.data.encoded.progress import Progress
from jaxft.data.encoded.work import NotKept, ReadCounts, Work
from jaxft.data.sources import Listed
from jaxft.errors import DataError

WORKER = Path(__file__).with_name("worker.py")
# Rows in one order are divided by this number alone, so that files do not depend on the number of processes.
PART_ROWS = 2048

# (first row, row after the last, path of the file) of a part.
Part = tuple[int, int, str]


def can_leave(work: Work) -> bool:
    """Whether other processes can do the work, but for reading rows: not if they cannot find a function by its name."""
    return _pickled(replace(work, rows=Listed([], []))) is not None


def encode_parts(work: Work, parts: Sequence[Part], count: int, progress: Progress) -> list[ReadCounts]:
    """Encodes the parts in `count` processes; the counts of each, in order. progress: is told of every part.

    Each process opens the rows itself; rows that only this one can read are sent. Raises DataError, that of the first
    row that has one, and if a process dies; and NotKept if a file cannot be written. The processes have ended when it
    returns.
    """
    as_bytes, reading = _pickled(work), None
    if as_bytes is None:
        as_bytes, reading = _pickled(replace(work, rows=Listed([], []))), Lock()
    if as_bytes is None:
        raise ValueError("the work cannot leave this process")
    idle: SimpleQueue[Worker] = SimpleQueue()
    workers = [Worker(as_bytes) for _ in range(min(count, len(parts)))]
    for worker in workers:
        idle.put(worker)

    def encode(part: Part) -> ReadCounts:
        worker, listed = idle.get(), None
        try:
            if reading is not None:
                with reading:
                    listed = Listed.of(work.rows, part[0], part[1])
            counts = worker.encode(part, listed)
            progress.add(part[1] - part[0])
            return counts
        finally:
            idle.put(worker)

    with contextlib.ExitStack() as stack:
        for worker in workers:
            stack.callback(worker.close)
        threads = stack.enter_context(ThreadPoolExecutor(len(workers)))
        futures: list[Future[ReadCounts]] = [threads.submit(encode, part) for part in parts]
        try:
            # In order, so that the first bad row is told, whichever process finds one first.
            return [future.result() for future in futures]
        finally:
            for worker in workers:
                worker.end()
            threads.shutdown(cancel_futures=True)


def _pickled(work: Work) -> bytes | None:
    try:
        return pickle.dumps(work, protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None


class Worker:
    """One process. It is started at once, and imports what it needs while others are started."""

    def __init__(self, work: bytes) -> None:
        ours, theirs = Pipe()
        # Encoding is divided among processes, not among threads of each; and accelerators belong to the run.
        alone = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(theirs.fileno()), *map(str, sys.path)],
            pass_fds=[theirs.fileno()],
            env=os.environ | alone | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run, which ends its processes itself
        )
        theirs.close()
        self._connection: Connection = ours
        self._work: bytes | None = work

    def encode(self, part: Part, listed: Listed | None) -> ReadCounts:
        """Has one part encoded. listed: its rows, if the process cannot open them.

        Raises DataError and NotKept as `encode_parts` does.
        """
        start, stop, _ = part
        try:
            if self._work is not None:
                self._connection.send_bytes(self._work)
                self._work = None
            self._connection.send((*part, listed))
            outcome, result = self._connection.recv()
        except (EOFError, OSError) as error:
            raise DataError(
                f"the process that tokenised rows {start:,} to {stop - 1:,} died (exit status {self._process.wait()}), "
                "as it does if the machine has too little memory. Set data.num_proc to a smaller number."
            ) from error
        if outcome == "ok":
            return ReadCounts.from_dict(result)
        if outcome == "data":
            raise DataError(result)
        if outcome == "disk":
            raise NotKept(result)
        raise RuntimeError(f"a process that tokenises rows failed:\n{result}")

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Closes the connection, once nobody waits for it."""
        self.end()
        self._connection.close()
