"""8-bit numbers with a dynamic exponent (arXiv:1511.04561), for 8-bit optimizers and double quantisation.

Every decade from 1e-6 to 1 has twice as many values as the one below, evenly spaced: 1, 2, 4, ... 64 with a sign and
twice as many without; in addition there are 0 and 1. Values and codes are those of bitsandbytes' dynamic map. `encode`
and `decode` compute one from the other by arithmetic, because tables of 256 are slow on devices without a cheap gather.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

GRID = 65535
DECADES = 7
ONE = 255
ZERO = {True: 127, False: 0}  # the code of 0: signed, unsigned


@functools.cache
def dynamic_map(*, signed: bool) -> np.ndarray:
    """The values in ascending order, float32 [256]. signed: from -1 instead of 0.

    A value is a power of ten times a fraction; the more bits the power takes, the fewer are left for the fraction.
    """
    powers, values = 7, [0.0, 1.0]
    for i in range(powers):
        edges = _spaced(2**i + 1 if signed else 2 ** (i + 1) + 1)
        fractions = (edges[:-1] + edges[1:]) / np.float32(2)
        positive = np.float32(10 ** (i - powers + 1)) * fractions
        values.extend(positive.tolist())
        if signed:
            values.extend((-positive).tolist())
    return np.sort(np.array(values, np.float32))


def _spaced(count: int) -> np.ndarray:
    """`count` even float32 numbers from 0.1 to 1, each computed from the nearer end in float32 steps, rounded once."""
    low, high = np.float32(0.1), np.float32(1.0)
    step = np.float64((high - low) / np.float32(count - 1))
    steps = np.arange(count)
    rising, falling = np.float64(low) + step * steps, np.float64(high) - step * steps[::-1]
    return np.where(steps < count // 2, rising, falling).astype(np.float32)


def nearest(x: jax.Array, *, signed: bool) -> jax.Array:
    """The code, uint8, of the value nearest to each x; of two equally near values, the lower.

    x, from -1 to 1, is first rounded to one of 65536 even steps, as bitsandbytes does on CPU with a table.
    """
    values = jnp.asarray(dynamic_map(signed=signed))
    step = jnp.floor((jnp.clip(x, -1.0, 1.0) + 1.0) * 0.5 * GRID + 0.5)
    x = step / GRID * 2.0 - 1.0
    above = jnp.clip(jnp.searchsorted(values, x, side="left"), 1, len(values) - 1)
    closer_below = x - values[above - 1] <= values[above] - x
    return jnp.where(closer_below, above - 1, above).astype(jnp.uint8)


def encode(x: jax.Array, *, signed: bool) -> jax.Array:
    """The code, uint8, of the value nearest to x, which is within [-1, 1] if signed, else within [0, 1]."""
    size = jnp.abs(x)
    scale, count = _by_decade(size, _decade_starts(signed), signed)
    within = jnp.clip(jnp.floor((size / scale - 0.1) / 0.9 * count), 0, count - 1)
    # Decades have 1, 2, 4, ... values, so the first rank of a decade is its count minus the count of the lowest.
    rank = (within + count - _counts(signed)[0]).astype(jnp.int32)
    rank = jnp.where(size < _decade_starts(signed)[0], -1, rank)
    code = ZERO[signed] + 1 + rank
    code = jnp.where(size >= _one_start(signed), ONE, code)
    if signed:
        # There is no code for -1, because 1 takes the 256th: the lowest value has rank 126.
        code = jnp.where(x < 0, ZERO[True] - 1 - jnp.where(size >= _one_start(True), 126, rank), code)
    return code.astype(jnp.uint8)


def decode(code: jax.Array, *, signed: bool) -> jax.Array:
    """The value of a code, float32."""
    code = code.astype(jnp.int32)
    rank = code - ZERO[signed] - 1
    if signed:
        rank = jnp.where(code < ZERO[True], ZERO[True] - 1 - code, rank)
    counts = _counts(signed)
    scale, count = _by_decade(rank, counts - counts[0], signed)
    within = rank - (count - counts[0])
    size = scale * (0.1 + 0.9 * (within + 0.5) / count)
    size = jnp.where(code == ZERO[signed], 0.0, jnp.where(code == ONE, 1.0, size))
    return jnp.where(code < ZERO[signed], -size, size)


def _counts(signed: bool) -> np.ndarray:
    """How many values each decade has."""
    return np.float32(2.0) ** (np.arange(DECADES, dtype=np.float32) + (0 if signed else 1))


def _decade_starts(signed: bool) -> np.ndarray:
    """For each decade, the smallest number that rounds into it: halfway from the last value below it, or from 0."""
    counts, tops = _counts(signed).astype(np.float64), 10.0 ** np.arange(1 - DECADES, 1)
    first, last = tops * (0.1 + 0.45 / counts), tops * (1 - 0.45 / counts)
    return ((first + np.append(0.0, last[:-1])) / 2).astype(np.float32)


def _one_start(signed: bool) -> np.float32:
    """The smallest number that rounds to 1."""
    return np.float32(1 - 0.225 / float(_counts(signed)[-1]))


def _by_decade(x: jax.Array, starts: np.ndarray, signed: bool) -> tuple[jax.Array, jax.Array]:
    """(upper end, number of values), float32, of the last decade whose start x reaches."""
    scale, count = jnp.full(x.shape, 10.0 ** (1 - DECADES), jnp.float32), jnp.full(x.shape, _counts(signed)[0])
    for decade in range(1, DECADES):
        reached = x >= starts[decade]
        scale = jnp.where(reached, np.float32(10.0 ** (decade + 1 - DECADES)), scale)
        count = jnp.where(reached, _counts(signed)[decade], count)
    return scale, count
