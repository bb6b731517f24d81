"""Virtual tokens: ids outside the vocabulary, at which prompt and prefix tuning insert learnt vectors.

They have positions, segments and cache slots like other tokens, so packing, meshes, windows and generation need no
special case. Each document begins with its own virtual tokens, and no document sees those of another.
"""

# B batch, S sequence, n virtual tokens

import jax
import jax.numpy as jnp

FIRST = 2**30  # beyond any vocabulary


def virtual_ids(count: int) -> tuple[int, ...]:
    """The ids at the start of every document, for a model with `count` virtual tokens."""
    return tuple(range(FIRST, FIRST + count))


def replace_virtual(x: jax.Array, own: jax.Array, virtual_BS: jax.Array) -> jax.Array:
    """x [B, S, ...] with `own[j]` ([n, ...]) at the positions whose virtual_BS is j; it is negative at other tokens.

    Computed as a matrix product, so that its gradient is summed over rows and devices like that of any weight.
    """
    one_hot_BSn = (virtual_BS[..., None] == jnp.arange(len(own))).astype(x.dtype)
    own = own.astype(x.dtype)
    inserted = jnp.einsum("BSn,nX->BSX", one_hot_BSn, own.reshape(len(own), -1)).reshape(x.shape)
    return jnp.where(virtual_BS.reshape(*virtual_BS.shape, *[1] * (x.ndim - 2)) >= 0, inserted, x)
