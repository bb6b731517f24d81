"""What several processes wrote reaches the disk in all of them, before one of them declares it whole."""

from pathlib import Path

import jax

from jaxft.files.atomic import flush_tree
from jaxft.sharding.processes import is_multi_process, is_primary, store

WAIT_MS = 3600 * 1000  # for another process to flush its files; a process that died is noticed long before


def flush_in_all(folder: Path, number: int) -> None:
    """Flushes all files and folders below `folder`; process 0 returns when every process has done so.

    Each host flushes what it has in its own memory, which matters on network file systems. number: of the call, the
    same in all processes. Raises OSError, in the process that met it and in process 0, if a disk refuses.
    """
    problem = None
    try:
        flush_tree(folder)
    except OSError as error:
        problem = error
    if is_multi_process():
        problem = _tell(f"jaxft/flushed/{number}", problem)
    if problem is not None:
        raise problem


def _tell(key: str, problem: OSError | None) -> OSError | None:
    """Tells process 0 of this process's outcome; in process 0, the first problem of any."""
    if not is_primary():
        store().key_value_set(f"{key}/{jax.process_index()}", "" if problem is None else str(problem))
        return problem
    for index in range(1, jax.process_count()):
        text = store().blocking_key_value_get(f"{key}/{index}", WAIT_MS)
        if text and problem is None:
            problem = OSError(f"process {index}: {text}")
    return problem
