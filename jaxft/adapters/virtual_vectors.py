"""Learnt vectors in the places of virtual tokens."""

# B batch, S sequence, n virtual tokens

import jax
import jax.numpy as jnp


def replace_virtual(x: jax.Array, own: jax.Array, virtual_BS: jax.Array) -> jax.Array:
    """x [B, S, ...] with `own[j]` ([n, ...]) at the positions whose virtual_BS is j; it is negative at other tokens.

    Computed as a matrix product, so that its gradient is summed over rows and devices like that of any weight.
    """
    one_hot_BSn = (virtual_BS[..., None] == jnp.arange(len(own))).astype(x.dtype)
    own = own.astype(x.dtype)
    inserted = jnp.einsum("BSn,nX->BSX", one_hot_BSn, own.reshape(len(own), -1)).reshape(x.shape)
    return jnp.where(virtual_BS.reshape(*virtual_BS.shape, *[1] * (x.ndim - 2)) >= 0, inserted, x)
