"""One run of several processes: process 0 does some work for all, and all receive the result.

The processes communicate through the key-value store of `jax.distributed`, not through the devices: it can wait for
hours, needs no compiled program, and does not hang on a device that is gone.
"""

import itertools
import json
from collections.abc import Callable
from typing import Protocol, TypeVar

import jax
from jax._src import distributed  # multihost_utils uses the devices, and the store has no public name

from jaxft.errors import JaxftError
from jaxft.files.buckets.working_copy import shown_text

Value = TypeVar("Value")

_SLICE_MS = 2000

_calls = itertools.count()  # every process makes the same calls in the same order


class PeerError(JaxftError):
    """Process 0 met an error that a user can mend; the other processes raise it with the same message."""


def is_multi_process() -> bool:
    """Whether this run has more than one process."""
    return jax.process_count() > 1


def is_primary() -> bool:
    """Whether this is process 0, which alone writes the files of a run."""
    return jax.process_index() == 0


def on_primary(make: Callable[[], Value]) -> Value:
    """Calls `make` in process 0 alone and returns its result, of JSON values, on every process.

    Call it on every process, in the same order; the others wait, and what `make` writes is on disk when they return.
    Raises the JaxftError that process 0 met; in the other processes it is a PeerError with the same message.
    """
    if not is_multi_process():
        return make()
    key = f"jaxft/on_primary/{next(_calls)}"
    if not is_primary():
        outcome = json.loads(_wait_for(key))
        if "error" in outcome:
            raise PeerError(outcome["error"])
        return outcome["value"]
    try:
        value = make()
    except JaxftError as error:
        store().key_value_set(key, json.dumps({"error": shown_text(str(error))}))
        raise
    store().key_value_set(key, json.dumps({"value": value}))
    return value


def primary_first(make: Callable[[], Value]) -> Value:
    """Calls `make` on every process, on the others once process 0 has its result, and returns each one's own.

    For what process 0 leaves on disk so that the others find it there. Call it on every process, in the same order.
    Raises what `make` raises; the others raise a PeerError for a JaxftError of process 0.
    """
    values: list[Value] = []
    on_primary(lambda: values.append(make()))
    return values[0] if values else make()


def process_share(count: int) -> range:
    """The indices from 0 to `count` that this process takes, if all processes share them evenly, in order."""
    index, processes = jax.process_index(), jax.process_count()
    return range(count * index // processes, count * (index + 1) // processes)


def gather(value: Value) -> list[Value]:
    """The values, of JSON, that every process gives, in the order of processes; on every process.

    Call it on every process, in the same order.
    """
    if not is_multi_process():
        return [value]
    return exchange(f"jaxft/gather/{next(_calls)}", value, jax.process_index(), jax.process_count())


def exchange(key: str, value: Value, me: int, count: int) -> list[Value]:
    """`gather` under a key that is used once, for process `me` of `count`. It needs no device."""
    if count == 1:
        return [value]
    store().key_value_set(f"{key}/{me}", json.dumps(value))
    return [json.loads(_wait_for(f"{key}/{i}")) for i in range(count)]


def _wait_for(key: str) -> str:
    """The value of a key, once another process has set it; however long that takes, Ctrl-C is answered."""
    while True:
        try:
            return store().blocking_key_value_get(key, _SLICE_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


class KeyValueStore(Protocol):
    """The part of JAX's client of the coordination service that is used here."""

    def key_value_set(self, key: str, value: str) -> None:
        """Sets a key, once."""

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        """The value of a key, once it is set."""


def store() -> KeyValueStore:
    """The store that all processes share, kept by process 0. Raises RuntimeError before `distributed.start`."""
    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("jax.distributed is not initialized: call jaxft.sharding.distributed.start() first")
    return client
