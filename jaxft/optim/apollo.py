"""APOLLO (arXiv:2412.05270): Adam's moments of gradients projected to a low rank at random, which scale the gradient.

For each matrix, the smaller side is projected to `rank`; each channel of the larger side is then scaled as much as Adam
would scale it in the projection. GaLore (arXiv:2403.03507) keeps moments of the same size, but finds its projections by
singular values of the gradient, which no accelerator does quickly; here a seed is all that is kept of them.
"""

# M, N smaller and larger side of a matrix, r rank

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

GAP = 200  # updates with one projection, then a new one (the paper's T)
GROWTH = 1.01  # how fast the norm of an update may grow from step to step (section 4.1; arXiv:2410.01623)
TINY = 1e-8


class ApolloState(NamedTuple):
    """count: int32, updates made. mu, nu: projected moments by path, `low` [..., r, N].

    norms: `norm` of the last update of each matrix, [...], by path; 0 before the first.
    """

    count: jax.Array
    mu: dict[str, dict[str, jax.Array]]
    nu: dict[str, dict[str, jax.Array]]
    norms: dict[str, dict[str, jax.Array]]


def scale_by_apollo(*, rank: int, b1: float, b2: float, eps: float, seed: int) -> optax.GradientTransformation:
    """APOLLO's direction, channel by channel (algorithm 1); on dicts from path to arrays [..., I, O], a matrix each."""

    def init(params: dict[str, jax.Array]) -> ApolloState:
        def low() -> dict[str, dict[str, jax.Array]]:
            return {p: {"low": jnp.zeros((*x.shape[:-2], rank, max(x.shape[-2:])))} for p, x in params.items()}

        norms = {path: {"norm": jnp.zeros(x.shape[:-2])} for path, x in params.items()}
        return ApolloState(jnp.int32(0), low(), low(), norms)

    def update(
        grads: dict[str, jax.Array], state: ApolloState, params: Any = None
    ) -> tuple[dict[str, jax.Array], ApolloState]:
        count = state.count + 1
        first, second = 1 - b1**count, jnp.sqrt(1 - b2**count)
        updates, new = {}, ApolloState(count, {}, {}, {})
        for path, grad in grads.items():
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
            low = _projected(grad, rank, jax.random.fold_in(key, state.count // GAP))
            mu = b1 * state.mu[path]["low"] + (1 - b1) * low
            nu = b2 * state.nu[path]["low"] + (1 - b2) * low * low
            scaled_low = mu / first / (jnp.sqrt(nu) / second + eps)
            scale = jnp.linalg.norm(scaled_low, axis=-2) / (jnp.linalg.norm(low, axis=-2) + TINY)
            update = grad * (scale[..., None, :] if _wide(grad) else scale[..., None])
            updates[path], norm = _limited(update, state.norms[path]["norm"])
            new.mu[path], new.nu[path], new.norms[path] = {"low": mu}, {"low": nu}, {"norm": norm}
        return updates, new

    return optax.GradientTransformation(init, update)


def projects(x: Any, rank: int) -> bool:
    """Whether a projection to `rank` makes a matrix smaller."""
    return x.ndim >= 2 and min(x.shape[-2:]) > rank


def _wide(x: jax.Array) -> bool:
    return x.shape[-1] >= x.shape[-2]


def _projected(grad: jax.Array, rank: int, key: jax.Array) -> jax.Array:
    """[..., r, N]: the gradient's smaller side times numbers of variance 1 / r, the same for a whole stack."""
    projection_rM = jax.random.normal(key, (rank, min(grad.shape[-2:]))) / math.sqrt(rank)
    side = "...mn" if _wide(grad) else "...nm"
    return jnp.einsum(f"rm,{side}->...rn", projection_rM, grad)


def _limited(update: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
    norm = jnp.linalg.norm(update, axis=(-2, -1))
    factor = jnp.where(before > 0, jnp.minimum(1.0, GROWTH * before / jnp.maximum(norm, TINY)), 1.0)
    return update * factor[..., None, None], norm * factor
