"""What recurrences in chunks share: cutting rows into chunks, fading within one, and the division over devices."""

# B batch, S sequence, N chunks, C positions of a chunk (D a second time), H heads or groups of them, R heads of a group

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.nn import partition


def in_chunks(x: jax.Array, size: int, *, mode: str = "constant") -> jax.Array:
    """[B, S, ...] -> [N, B, C, ...]. mode: of the padding that fills the last chunk, as for jnp.pad."""
    padding = -x.shape[1] % size
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), mode=mode)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def chunk_size(length: int, most: int) -> int:
    """The positions of a chunk: a power of two, `most` for rows that are long enough."""
    return min(most, 1 << (length - 1).bit_length())


class Fading(NamedTuple):
    """What is left of a state after some positions of a chunk, 0 across borders of documents.

    within_BHRCD: of what position D added, at position C; 0 for D behind C. reads_BHRC: of the state before the chunk,
    at position C. stays_BHRC: of what position C added, after the chunk. keeps_BHR: of the state before, after it.
    last_B: the document of the last position.
    """

    within_BHRCD: jax.Array
    reads_BHRC: jax.Array
    stays_BHRC: jax.Array
    keeps_BHR: jax.Array
    last_B: jax.Array


def fading(decay_BCHR: jax.Array, documents_BC: jax.Array, owner_B: jax.Array) -> Fading:
    """decay_BCHR: the logarithm of what a position leaves of the state, at most 0. owner_B: the state's document."""
    faded_BHRC = jnp.cumsum(jnp.moveaxis(decay_BCHR, 1, -1), axis=-1)
    last_B = documents_BC[:, -1]

    def where(mask: jax.Array, exponent: jax.Array) -> jax.Array:
        # Masked before the exponential too: an exponent of the wrong sign could overflow, and its gradient be NaN.
        return jnp.where(mask, jnp.exp(jnp.where(mask, exponent, 0)), 0)

    pairs_BCD = (documents_BC[:, :, None] == documents_BC[:, None, :]) & jnp.tri(documents_BC.shape[1], dtype=bool)
    return Fading(
        where(pairs_BCD[:, None, None], faded_BHRC[..., :, None] - faded_BHRC[..., None, :]),
        where((documents_BC == owner_B[:, None])[:, None, None], faded_BHRC),
        where((documents_BC == last_B[:, None])[:, None, None], faded_BHRC[..., -1:] - faded_BHRC),
        where((owner_B == last_B)[:, None, None], faded_BHRC[..., -1]),
        last_B,
    )


def on_own_heads(
    rule: Callable[..., Any],
    arrays: Sequence[jax.Array],
    dimensions: Sequence[partition.Dimensions],
    outputs: Sequence[int],
) -> Any:
    """`rule(*arrays)` on every device for its own rows and heads, which exchange nothing.

    dimensions: of each array. outputs: for each of the rule's results the array whose layout it has.
    """
    if partition.is_unsharded():
        return rule(*arrays)
    specs = tuple(partition.spec(x.shape, dims, uneven=None) for x, dims in zip(arrays, dimensions, strict=True))
    run = jax.shard_map(rule, in_specs=specs, out_specs=tuple(specs[index] for index in outputs), check_vma=False)
    return run(*arrays)
