"""An order of queries in which every part of a row, on its own device, has the same number of keys to look at.

In causal order the last of C parts sees 2 - 1/C times as many keys as the mean, and the others wait for it. Here a row
has 2 C chunks, and device i attends from chunks i and 2 C - 1 - i: a near one and a far one. Only queries move to their
device, and results back; keys and values are gathered in causal order. Source of the order: Llama 3, arXiv:2407.21783,
section 3.3.2.
"""

# B batch, S positions of a part, N query heads, H head_dim

import jax
import jax.numpy as jnp
import numpy as np

AXIS = "context"
SCOPE = "balanced_queries"  # in compiled programs, the name of what attends from queries in this order


def chunk_order(parts: int) -> list[int]:
    """The numbers of the chunks, two for each part: 0, 2 C - 1, 1, 2 C - 2, ..."""
    return [chunk for part in range(parts) for chunk in (part, 2 * parts - 1 - part)]


def query_order(length: int, parts: int) -> np.ndarray:
    """int32[length]: the position of each query, part by part. Raises ValueError if no 2 * parts chunks are equal."""
    if length % (2 * parts):
        raise ValueError(f"{length} positions are not {2 * parts} chunks of the same length")
    positions = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    return positions[chunk_order(parts)].reshape(-1)


def take_queries(x_BSNH: jax.Array) -> jax.Array:
    """Exchanges the halves of every part, so that each device has its two chunks. For use under `shard_map`."""
    halves = jnp.split(x_BSNH, 2, axis=1)  # part i holds chunks 2 i and 2 i + 1
    ways = _ways(jax.lax.axis_size(AXIS))
    even, odd = (jax.lax.ppermute(half, AXIS, pairs) for half, pairs in zip(halves, ways, strict=True))
    return jnp.concatenate(_by_parity(even, odd), axis=1)  # the near chunk of device i has the number i


def return_results(x_BSNH: jax.Array) -> jax.Array:
    """The inverse of `take_queries`: every device gets its own part in causal order."""
    halves = _by_parity(*jnp.split(x_BSNH, 2, axis=1))
    ways = [[(target, source) for source, target in pairs] for pairs in _ways(jax.lax.axis_size(AXIS))]
    parts = [jax.lax.ppermute(half, AXIS, pairs) for half, pairs in zip(halves, ways, strict=True)]
    return jnp.concatenate(parts, axis=1)


def own_columns(x_BT: jax.Array) -> jax.Array:
    """The columns of whole rows [B, T] that belong to the queries of this device, [B, S]. For use under `shard_map`."""
    parts = jax.lax.axis_size(AXIS)
    size, part = x_BT.shape[1] // (2 * parts), jax.lax.axis_index(AXIS)
    near, far = (
        jax.lax.dynamic_slice_in_dim(x_BT, chunk * size, size, axis=1) for chunk in (part, 2 * parts - 1 - part)
    )
    return jnp.concatenate([near, far], axis=1)


def _by_parity(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as they are on devices of even numbers, and swapped on the others."""
    is_even = jax.lax.axis_index(AXIS) % 2 == 0
    return jnp.where(is_even, first, second), jnp.where(is_even, second, first)


def _ways(parts: int) -> list[list[tuple[int, int]]]:
    """(source, target) of the even chunks, then of the odd ones: from each device one of both, and to each one."""
    return [
        [(chunk // 2, min(chunk, 2 * parts - 1 - chunk)) for chunk in range(first, 2 * parts, 2)] for first in (0, 1)
    ]
