"""Optimizer moments in bfloat16 with stochastic rounding, so that small changes are kept on average.

A second moment changes by a thousandth of itself in a step, less than half the distance between two bfloat16 numbers:
rounded to the nearest, it would never change. Stochastic rounding goes up or down with the probabilities that preserve
the expectation (arXiv:1502.02551, section 3).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

# float32 has 16 bits that bfloat16 lacks.
LOST_BITS = 16


class RoundedState(NamedTuple):
    """steps: int32, number of updates so far. inner: the optimizer's own state, its float32 arrays in bfloat16."""

    steps: jax.Array
    inner: optax.OptState


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds float32 to one of its two bfloat16 neighbours, so that the expectation is x. Infinities and NaN stay."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = (bits + noise) >> LOST_BITS << LOST_BITS
    rounded = jax.lax.bitcast_convert_type(kept, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def moments_in_bfloat16(tx: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
    """`tx`, computed in float32, with arrays stored in bfloat16 between updates.

    Only arrays with axes are rounded; counters and scalars are not. The noise follows from seed, step and array, so
    that a resumed run rounds as an uninterrupted one.
    """

    def shrink(state: optax.OptState, key: jax.Array | None) -> optax.OptState:
        leaves, treedef = jax.tree.flatten(state)
        out = []
        for index, x in enumerate(leaves):
            if not _is_moment(x, jnp.float32):
                out.append(x)
            elif key is None:
                out.append(x.astype(jnp.bfloat16))
            else:
                out.append(stochastic_round(x, jax.random.fold_in(key, index)))
        return jax.tree.unflatten(treedef, out)

    def init(params: optax.Params) -> RoundedState:
        return RoundedState(jnp.int32(0), shrink(tx.init(params), None))

    def update(
        grads: optax.Updates, state: RoundedState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, RoundedState]:
        inner = jax.tree.map(lambda x: x.astype(jnp.float32) if _is_moment(x, jnp.bfloat16) else x, state.inner)
        updates, inner = tx.update(grads, inner, params)
        key = jax.random.fold_in(jax.random.key(seed), state.steps)
        return updates, RoundedState(state.steps + 1, shrink(inner, key))

    return optax.GradientTransformation(init, update)


def _is_moment(x: jax.Array, dtype: DTypeLike) -> bool:
    return x.ndim > 0 and x.dtype == dtype
