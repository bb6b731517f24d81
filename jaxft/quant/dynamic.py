"""Dynamic 8-bit numbers: 256 values between -1 and 1 (or 0 and 1), finest near zero (arXiv:2110.02861, section 1.3)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def dynamic_map(*, signed: bool) -> np.ndarray:
    """The values in rising order, float32 [256]. signed: from -1 instead of 0.

    A value is a power of ten and a fraction; the more bits the power takes, the fewer are left for the fraction.
    """
    powers, found = 7, [0.0, 1.0]
    for i in range(powers):
        edges = _spaced(2**i + 1 if signed else 2 ** (i + 1) + 1)
        fractions = (edges[:-1] + edges[1:]) / np.float32(2)
        positive = np.float32(10 ** (i - powers + 1)) * fractions
        found.extend(positive.tolist())
        if signed:
            found.extend((-positive).tolist())
    return np.sort(np.array(found, np.float32))


def _spaced(count: int) -> np.ndarray:
    """`count` numbers from 0.1 to 1, float32, each counted from its nearer end in float32 steps and rounded once."""
    low, high = np.float32(0.1), np.float32(1.0)
    step = np.float64((high - low) / np.float32(count - 1))
    places = np.arange(count)
    rising, falling = np.float64(low) + step * places, np.float64(high) - step * places[::-1]
    return np.where(places < count // 2, rising, falling).astype(np.float32)


GRID = 65535


def nearest(x: jax.Array, *, signed: bool) -> jax.Array:
    """The number of the value nearest to each of x, uint8; the lower one where both are as near.

    x, from -1 to 1, is first rounded to one of 65536 even steps, as bitsandbytes does on CPU with a table.
    """
    values = jnp.asarray(dynamic_map(signed=signed))
    step = jnp.floor((jnp.clip(x, -1.0, 1.0) + 1.0) * 0.5 * GRID + 0.5)
    x = step / GRID * 2.0 - 1.0
    above = jnp.clip(jnp.searchsorted(values, x, side="left"), 1, len(values) - 1)
    closer_below = x - values[above - 1] <= values[above] - x
    return jnp.where(closer_below, above - 1, above).astype(jnp.uint8)
