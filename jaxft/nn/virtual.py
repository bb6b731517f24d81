"""Virtual tokens: ids of no vocabulary, which stand in a row where an adapter puts vectors of its own.

They take positions, segments and places in the cache as other tokens do, so that packing, meshes, windows and
generation need to know nothing of them: each document begins with them, and none sees another's.
"""

# B batch, S sequence, n virtual tokens

import jax
import jax.numpy as jnp

FIRST = 2**30  # beyond any vocabulary


def virtual_ids(count: int) -> tuple[int, ...]:
    """The ids that stand at the start of every row for a model with so many virtual tokens."""
    return tuple(range(FIRST, FIRST + count))


def replace_virtual(x: jax.Array, own: jax.Array, virtual_BS: jax.Array) -> jax.Array:
    """x [B, S, ...] with row j of `own` [n, ...] where virtual_BS is j; it is negative for other tokens.

    As a product: its gradient adds up over rows and devices like that of any weight.
    """
    chosen_BSn = (virtual_BS[..., None] == jnp.arange(len(own))).astype(x.dtype)
    own = own.astype(x.dtype)
    put = jnp.einsum("BSn,nX->BSX", chosen_BSn, own.reshape(len(own), -1)).reshape(x.shape)
    return jnp.where(virtual_BS.reshape(*virtual_BS.shape, *[1] * (x.ndim - 2)) >= 0, put, x)
