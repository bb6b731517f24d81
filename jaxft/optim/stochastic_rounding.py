"""Optimizer moments in bfloat16, rounded at random so that small changes are not lost on average.

A second moment moves by a thousandth of itself in a step, less than half the distance between two numbers of bfloat16:
rounded to the nearest it would never move. Rounded up or down with the probability that its expectation keeps, it does
(arXiv:1502.02551, section 3).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# float32 has 16 bits that bfloat16 lacks.
LOST_BITS = 16


class RoundedState(NamedTuple):
    """count: int32, updates made. inner: the optimizer's own state, its float32 arrays in bfloat16."""

    count: jax.Array
    inner: Any


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> bfloat16, to one of its two neighbours, so that the expectation is x. Infinite and NaN stay so."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = (bits + noise) >> LOST_BITS << LOST_BITS
    rounded = jax.lax.bitcast_convert_type(kept, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def moments_in_bfloat16(tx: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
    """`tx`, computed in float32, whose arrays are kept in bfloat16 between updates.

    Only arrays with axes are rounded; counters and scalars stay. The noise follows from seed, update and array, so that
    a run that goes on after an interruption rounds as it would have.
    """

    def shrink(state: Any, key: jax.Array | None) -> Any:
        leaves, treedef = jax.tree.flatten(state)
        out = []
        for index, x in enumerate(leaves):
            if not _is_moment(x, jnp.float32):
                out.append(x)
            elif key is None:
                out.append(x.astype(jnp.bfloat16))
            else:
                out.append(stochastic_round(x, jax.random.fold_in(key, index)))
        return treedef.unflatten(out)

    def init(params: Any) -> RoundedState:
        return RoundedState(jnp.int32(0), shrink(tx.init(params), None))

    def update(grads: Any, state: RoundedState, params: Any = None) -> tuple[Any, RoundedState]:
        inner = jax.tree.map(lambda x: x.astype(jnp.float32) if _is_moment(x, jnp.bfloat16) else x, state.inner)
        updates, inner = tx.update(grads, inner, params)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        return updates, RoundedState(state.count + 1, shrink(inner, key))

    return optax.GradientTransformation(init, update)


def _is_moment(x: Any, dtype: Any) -> bool:
    return x.ndim > 0 and x.dtype == dtype
