"""Numbers in 8 bits with a dynamic exponent (arXiv:1511.04561), as 8-bit optimizers and double quantisation use them.

Every decade from 1e-6 to 1 has twice as many numbers as the one below, evenly spaced in it, 1, 2, 4, ... 64 with a sign
and twice that without; besides there are 0 and 1. They are bitsandbytes' dynamic map and code numbers. Code and number
follow from each other by arithmetic too (`encode`, `decode`): tables of 256 are slow where there is no cheap gather.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

GRID = 65535
DECADES = 7
ONE = 255
ZERO = {True: 127, False: 0}  # its code, by whether there are signs


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


def encode(x: jax.Array, *, signed: bool) -> jax.Array:
    """The code, uint8, of the number nearest to x: within [-1, 1] where signed, else [0, 1]."""
    size = jnp.abs(x)
    scale, count = _by_decade(size, _first_of_decade(signed), signed)
    within = jnp.clip(jnp.floor((size / scale - 0.1) / 0.9 * count), 0, count - 1)
    # Decades of 1, 2, 4, ... numbers: the first of one is its count further than the first of the lowest.
    place = (within + count - _counts(signed)[0]).astype(jnp.int32)
    place = jnp.where(size < _first_of_decade(signed)[0], -1, place)
    code = ZERO[signed] + 1 + place
    code = jnp.where(size >= _last(signed), ONE, code)
    if signed:
        # -1 is missing: its place is taken by 1.
        code = jnp.where(x < 0, ZERO[True] - 1 - jnp.where(size >= _last(True), 126, place), code)
    return code.astype(jnp.uint8)


def decode(code: jax.Array, *, signed: bool) -> jax.Array:
    """The number of a code, float32."""
    code = code.astype(jnp.int32)
    place = code - ZERO[signed] - 1
    if signed:
        place = jnp.where(code < ZERO[True], ZERO[True] - 1 - code, place)
    counts = _counts(signed)
    scale, count = _by_decade(place, counts - counts[0], signed)
    within = place - (count - counts[0])
    size = scale * (0.1 + 0.9 * (within + 0.5) / count)
    size = jnp.where(code == ZERO[signed], 0.0, jnp.where(code == ONE, 1.0, size))
    return jnp.where(code < ZERO[signed], -size, size)


def _counts(signed: bool) -> np.ndarray:
    """How many numbers each decade has."""
    return np.float32(2.0) ** (np.arange(DECADES, dtype=np.float32) + (0 if signed else 1))


def _first_of_decade(signed: bool) -> np.ndarray:
    """From where on a number is nearest to one of each decade: halfway from the last of the decade below, or from 0."""
    counts, tops = _counts(signed).astype(np.float64), 10.0 ** np.arange(1 - DECADES, 1)
    first, last = tops * (0.1 + 0.45 / counts), tops * (1 - 0.45 / counts)
    return np.float32((first + np.append(0.0, last[:-1])) / 2)


def _last(signed: bool) -> np.float32:
    """From where on a number is nearest to 1."""
    return np.float32(1 - 0.225 / float(_counts(signed)[-1]))


def _by_decade(x: jax.Array, starts: np.ndarray, signed: bool) -> tuple[jax.Array, jax.Array]:
    """(upper end of the decade, how many numbers it has), float32, of the last decade whose start x reaches."""
    scale, count = jnp.full(x.shape, 10.0 ** (1 - DECADES), jnp.float32), jnp.full(x.shape, _counts(signed)[0])
    for decade in range(1, DECADES):
        reached = x >= starts[decade]
        scale = jnp.where(reached, np.float32(10.0 ** (decade + 1 - DECADES)), scale)
        count = jnp.where(reached, _counts(signed)[decade], count)
    return scale, count
