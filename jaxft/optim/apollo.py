"""APOLLO (arXiv:2412.05270): scales gradients by Adam's moments in a random projection of low rank.

The smaller side of each matrix is projected to `rank`; each channel of the larger side is then scaled by the factor
that Adam has for it in the projection. GaLore (arXiv:2403.03507) stores moments of the same size, but computes its
projections from singular values of the gradient, which is slow on accelerators; APOLLO draws them from a seed.
"""

# M, N smaller and larger side of a matrix, r rank

import math
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

GAP = 200  # updates until a new projection is drawn (the paper's T)
GROWTH = 1.01  # largest growth of an update's norm from step to step (section 4.1; arXiv:2410.01623)
TINY = 1e-8


class ApolloState(NamedTuple):
    """steps: int32, number of updates so far. mu, nu: projected moments by path, `low` [..., r, N].

    norms: `norm` [...] of the last update of each matrix, by path; 0 before the first update.
    """

    steps: jax.Array
    mu: dict[str, dict[str, jax.Array]]
    nu: dict[str, dict[str, jax.Array]]
    norms: dict[str, dict[str, jax.Array]]


def scale_by_apollo(*, rank: int, b1: float, b2: float, eps: float, seed: int) -> optax.GradientTransformation:
    """APOLLO's direction, channel by channel (algorithm 1); for dicts from path to matrices [..., I, O].

    seed: of the projections, together with path and step.
    """

    def init(params: dict[str, jax.Array]) -> ApolloState:
        def low() -> dict[str, dict[str, jax.Array]]:
            return {p: {"low": jnp.zeros((*x.shape[:-2], rank, max(x.shape[-2:])))} for p, x in params.items()}

        norms = {path: {"norm": jnp.zeros(x.shape[:-2])} for path, x in params.items()}
        return ApolloState(jnp.int32(0), low(), low(), norms)

    def update(
        grads: dict[str, jax.Array], state: ApolloState, params: dict[str, jax.Array] | None = None
    ) -> tuple[dict[str, jax.Array], ApolloState]:
        steps = state.steps + 1
        first, second = 1 - b1**steps, jnp.sqrt(1 - b2**steps)
        updates: dict[str, jax.Array] = {}
        new = ApolloState(steps, {}, {}, {})
        for path, grad in grads.items():
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
            low = _project(grad, rank, jax.random.fold_in(key, state.steps // GAP))
            mu = b1 * state.mu[path]["low"] + (1 - b1) * low
            nu = b2 * state.nu[path]["low"] + (1 - b2) * low * low
            scaled_low = mu / first / (jnp.sqrt(nu) / second + eps)
            scale = jnp.linalg.norm(scaled_low, axis=-2) / (jnp.linalg.norm(low, axis=-2) + TINY)
            update = grad * (scale[..., None, :] if _is_wide(grad) else scale[..., None])
            updates[path], norm = _limit_growth(update, state.norms[path]["norm"])
            new.mu[path], new.nu[path], new.norms[path] = {"low": mu}, {"low": nu}, {"norm": norm}
        return updates, new

    return optax.GradientTransformation(init, update)


def is_projected(x: jax.Array, rank: int) -> bool:
    """Whether a projection to `rank` makes the array, if it is a matrix, smaller."""
    return x.ndim >= 2 and min(x.shape[-2:]) > rank


def _is_wide(x: jax.Array) -> bool:
    return x.shape[-1] >= x.shape[-2]


def _project(grad: jax.Array, rank: int, key: jax.Array) -> jax.Array:
    """[..., r, N]: the smaller side of the gradient times numbers of variance 1 / r, the same for a whole stack."""
    projection_rM = jax.random.normal(key, (rank, min(grad.shape[-2:]))) / math.sqrt(rank)
    side = "...mn" if _is_wide(grad) else "...nm"
    return jnp.einsum(f"rm,{side}->...rn", projection_rM, grad)


def _limit_growth(update: jax.Array, last_norm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(update, its norm), scaled down if the norm is more than GROWTH times the last one."""
    norm = jnp.linalg.norm(update, axis=(-2, -1))
    factor = jnp.where(last_norm > 0, jnp.minimum(1.0, GROWTH * last_norm / jnp.maximum(norm, TINY)), 1.0)
    return update * factor[..., None, None], norm * factor
