"""Several processes as one run: what process 0 does for all, and what all agree on.

They talk through the key-value store of `jax.distributed`, not through the devices: it waits for hours, needs no
compiled program, and does not hang on a device that is gone.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # multihost_utils goes through the devices, and the store has no public name

from jaxft.errors import JaxftError

_WAIT_MS = 24 * 3600 * 1000

_calls = itertools.count()  # every process asks the same questions in the same order


class PeerError(JaxftError):
    """Process 0 met an error that a user can mend; every process raises it with the same words."""


def is_multi_process() -> bool:
    """Whether this run has more than one process."""
    return jax.process_count() > 1


def is_primary() -> bool:
    """Whether this is process 0, which alone writes what is written once."""
    return jax.process_index() == 0


def on_primary(make: Callable[[], Any]) -> Any:
    """What `make` gives in process 0 (JSON values), on every process. Only process 0 calls it; the others wait.

    Call it on every process, in the same order; what it does on disk is done when it returns. Raises on every
    process the JaxftError that process 0 met: there as it was, elsewhere as a PeerError of the same words.
    """
    if not is_multi_process():
        return make()
    key = f"jaxft/agreed/{next(_calls)}"
    if not is_primary():
        told = json.loads(store().blocking_key_value_get(key, _WAIT_MS))
        if "error" in told:
            raise PeerError(told["error"])
        return told["value"]
    try:
        value = make()
    except JaxftError as error:
        store().key_value_set(key, json.dumps({"error": str(error)}))
        raise
    store().key_value_set(key, json.dumps({"value": value}))
    return value


def store() -> Any:
    """The key-value store that all processes share; it lives in process 0. There only where `several()`."""
    return distributed.global_state.client
