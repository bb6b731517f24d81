"""The weighted sum of the answers of each token's experts: rows sorted by expert going there, by token coming back.

Both ways have gradients of their own: those of gathered rows are gathered, and added up in float32. By default they
would be scattered, which accelerators do row by row, and added in the type of computation.
"""

# M tokens, K experts of one token, R rows (M * K), D model, E experts

from collections.abc import Callable

import jax
import jax.numpy as jnp

# (x [R, D] sorted by expert, number of rows of each expert) -> [R, D]
SortedExperts = Callable[[jax.Array, jax.Array], jax.Array]


def combine(
    experts: SortedExperts, count: int, x_MD: jax.Array, weights_MK: jax.Array, experts_MK: jax.Array
) -> jax.Array:
    """The weighted sum of the answers of each token's experts, of which there are `count`; [M, D] float32.

    D may be several dimensions here, of rows and answers alike.
    """
    order_R = jnp.argsort(experts_MK.reshape(-1), stable=True)
    positions_MK = jnp.argsort(order_R).reshape(experts_MK.shape)
    sizes_E = jnp.bincount(experts_MK.reshape(-1), length=count).astype(jnp.int32)
    return _weighted(experts(_sorted(x_MD, order_R, positions_MK), sizes_E), weights_MK, order_R, positions_MK)


@jax.custom_vjp
def _sorted(x_MD: jax.Array, order_R: jax.Array, positions_MK: jax.Array) -> jax.Array:
    """The token of each choice, sorted. order_R: the choices, of all tokens in a row; positions_MK: the inverse."""
    return x_MD[order_R // positions_MK.shape[1]]


def _sorted_forward(x_MD: jax.Array, order_R: jax.Array, positions_MK: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _sorted(x_MD, order_R, positions_MK), positions_MK


def _sorted_backward(positions_MK: jax.Array, grad_RD: jax.Array) -> tuple[jax.Array, None, None]:
    return grad_RD[positions_MK].astype(jnp.float32).sum(axis=1).astype(grad_RD.dtype), None, None


_sorted.defvjp(_sorted_forward, _sorted_backward)


@jax.custom_vjp
def _weighted(rows_RD: jax.Array, weights_MK: jax.Array, order_R: jax.Array, positions_MK: jax.Array) -> jax.Array:
    """The weighted sum of the K rows at each token's positions, [M, D] float32."""
    inner = tuple(range(2, rows_RD.ndim + 1))
    return (rows_RD[positions_MK].astype(jnp.float32) * jnp.expand_dims(weights_MK, inner)).sum(axis=1)


def _weighted_forward(
    rows_RD: jax.Array, weights_MK: jax.Array, order_R: jax.Array, positions_MK: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _weighted(rows_RD, weights_MK, order_R, positions_MK), (rows_RD, weights_MK, order_R, positions_MK)


def _weighted_backward(residuals: tuple[jax.Array, ...], grad_MD: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    rows_RD, weights_MK, order_R, positions_MK = residuals
    # Both from the rows as they are sorted: the gradient of a token is gathered once.
    grad_RD = grad_MD.astype(rows_RD.dtype)[order_R // positions_MK.shape[1]].astype(jnp.float32)
    inner = tuple(range(1, rows_RD.ndim))
    weights_R1 = jnp.expand_dims(weights_MK.reshape(-1)[order_R], inner)
    grad_weights_R = (rows_RD.astype(jnp.float32) * grad_RD).sum(axis=inner)
    return (grad_RD * weights_R1).astype(rows_RD.dtype), grad_weights_R[positions_MK], None, None


_weighted.defvjp(_weighted_forward, _weighted_backward)
