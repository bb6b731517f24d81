"""Arrays over devices of several processes: in from each one's part, out to host memory."""

# B batch

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, Sharding


def from_rows(make: Callable[[slice], Any], rows: int, sharding: NamedSharding) -> Any:
    """A pytree of global arrays [B, ...], of which this process makes only the rows that its devices hold.

    make(slice): those rows as a pytree of numpy arrays. rows: B. sharding: splits B alone.
    """
    where = sharding.addressable_devices_indices_map((rows,))
    cuts = sorted({cut.indices(rows)[:2] for (cut,) in where.values()})
    parts = {cut: make(slice(*cut)) for cut in cuts}

    def join(*leaves: np.ndarray) -> jax.Array:
        held = dict(zip(parts, leaves, strict=True))
        shape = (rows, *leaves[0].shape[1:])
        return jax.make_array_from_callback(shape, sharding, lambda index: held[index[0].indices(rows)[:2]])

    return jax.tree.map(join, *parts.values())


def spread(x: jax.Array, sharding: Sharding) -> jax.Array:
    """x on a sharding that may reach over several processes. Where it is not there yet, all hold the same x."""
    if sharding.is_fully_addressable or not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = spread(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    # device_put would compare the copies of all processes first, through the network.
    whole = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: whole[index])


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array in the host memory of every process; all must ask for it, in the same order.

    One that reaches over several processes is for this while whole on every device.
    """
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)
