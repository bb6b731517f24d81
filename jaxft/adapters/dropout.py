"""Dropout of the inputs of adapters (arXiv:2106.09685), from one random byte for each number."""

# B rows, S positions, I inputs; Q a quarter of the positions

import jax
import jax.numpy as jnp

LEVELS = 256  # of a byte


def dropped_levels(rate: float) -> int:
    """How many of 256 numbers are dropped on average: the rate rounded to 1/256, but neither none nor all of them."""
    return 0 if rate == 0 else min(max(round(rate * LEVELS), 1), LEVELS - 1)


def described(rate: float) -> str:
    """For people, after the description of an adapter: `, dropout 13/256`; empty if nothing is dropped."""
    return f", dropout {dropped_levels(rate)}/{LEVELS}" if rate else ""


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """x with a share of its numbers set to zero and the others scaled up; x itself without a key.

    The share is the rate rounded by `dropped_levels`. The draw depends on the key and the shape of x alone, not on the
    mesh.
    """
    dropped = dropped_levels(rate)
    if key is None or dropped == 0:
        return x
    scaled = x.astype(jnp.float32) * (LEVELS / (LEVELS - dropped))
    return jnp.where(_kept(key, x.shape, dropped), scaled, 0).astype(x.dtype)


def _kept(key: jax.Array, shape: tuple[int, ...], dropped: int) -> jax.Array:
    """Whether each number is kept. A word decides on four positions, each a quarter of the positions apart."""
    *rows, length, inputs = shape if len(shape) > 1 else (1, *shape)
    words_BQI = jax.random.bits(key, (*rows, -(-length // 4), inputs), jnp.uint32)
    # Without the barrier a compiler may draw each word again for each of its bytes. The quarters are joined when they
    # are bits: a compiler for TPUs writes whole words four times if these are given another axis.
    words_BQI = jax.lax.optimization_barrier(words_BQI)
    quarters = [((words_BQI >> shift) & (LEVELS - 1)) >= dropped for shift in (0, 8, 16, 24)]
    return jnp.concatenate(quarters, axis=-2)[..., :length, :].reshape(shape)
