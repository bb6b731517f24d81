"""A step is read back, once in each run, before it is declared whole.

Checksums show that files stay as they were written. That they can be restored at all, from this folder and by these
versions of the libraries, shows only when it is done.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxft.checkpoint.steps.reader import reader
from jaxft.errors import CheckpointError

BUDGET = 2**26  # bytes of arrays that are kept and compared: all of a small run, a part of a large one

Index = tuple[slice, ...]
Copies = Mapping[str, list[tuple[Index, np.ndarray]]]


def copies(arrays: Mapping[str, jax.Array], budget: int = BUDGET) -> Copies:
    """Copies of the smallest arrays, of `budget` bytes in all and at least of one, as far as this process holds them.

    By path, each part with its index in the whole array.
    """
    out: dict[str, list[tuple[Index, np.ndarray]]] = {}
    used = 0
    for path, array in sorted(arrays.items(), key=lambda item: (item[1].nbytes, item[0])):
        used += array.nbytes
        if out and used > budget:
            break
        parts = {str(shard.index): (shard.index, shard.data) for shard in array.addressable_shards}
        out[path] = [(index, np.array(data)) for index, data in parts.values()]  # the buffer may be donated
    return out


def compare(state_folder: Any, expected: Copies) -> None:
    """Restores these arrays from the `state/` of a step, in this process alone, and compares every bit.

    Raises CheckpointError naming each array that differs, and whatever Orbax raises if they cannot be read.
    """
    args = ocp.args.PyTreeRestore(
        dict.fromkeys(expected, 0),
        restore_args={path: ocp.RestoreArgs(restore_type=np.ndarray) for path in expected},
        partial_restore=True,
    )
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="read_back"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with reader(handler, multiprocessing_options=alone) as checkpointer:
        restored = checkpointer.restore(state_folder, args=args)
    differing = [path for path, parts in expected.items() if not _same(np.asarray(restored[path]), parts)]
    if differing:
        raise CheckpointError(f"{len(differing)} arrays read back differently, the first of them {differing[0]}")


def _same(read: np.ndarray, parts: list[tuple[Index, np.ndarray]]) -> bool:
    return all(
        read.dtype == part.dtype and read[index].shape == part.shape and read[index].tobytes() == part.tobytes()
        for index, part in parts
    )
