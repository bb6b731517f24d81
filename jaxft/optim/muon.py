"""Muon: orthogonalises the momentum of each matrix by a few Newton-Schulz iterations.

Source: Keller Jordan's description of Muon (2024). Updates are scaled to the size of AdamW's as in arXiv:2502.16982,
section 2.2, so that one learning rate suits both.
"""

# I, O rows and columns of a matrix

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.nn import partition

ITERATIONS = 5
# Of the quintic polynomial: steep at 0; its iterates settle within about 0.3 of 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
RMS = 0.2  # root mean square of an update
TINY = 1e-7


class MuonState(NamedTuple):
    """mu: momentum by path, shaped like the parameter."""

    mu: dict[str, jax.Array]


def scale_by_orthogonal_momentum(momentum: float) -> optax.GradientTransformation:
    """Muon's direction with Nesterov momentum; for dicts from path to matrices [..., I, O].

    As the original. optax.contrib.muon corrects the bias of momentum and gradient by different factors, so that in the
    first steps it mixes them in other shares.
    """

    def init(params: dict[str, jax.Array]) -> MuonState:
        return MuonState({path: jnp.zeros_like(x) for path, x in params.items()})

    def update(
        grads: dict[str, jax.Array], state: MuonState, params: dict[str, jax.Array] | None = None
    ) -> tuple[dict[str, jax.Array], MuonState]:
        mu = {path: momentum * state.mu[path] + (1 - momentum) * grad for path, grad in grads.items()}
        ahead = {path: momentum * mu[path] + (1 - momentum) * grad for path, grad in grads.items()}
        size = {path: RMS * math.sqrt(max(grad.shape[-2:])) for path, grad in grads.items()}
        return {path: size[path] * orthogonalize(x) for path, x in ahead.items()}, MuonState(mu)

    return optax.GradientTransformation(init, update)


def orthogonalize(x: jax.Array) -> jax.Array:
    """Moves the singular values of each matrix [..., I, O] near 1, roughly between 0.7 and 1.2.

    On a mesh every device takes whole matrices of a stack, because products of sharded matrices would need a sum over
    devices in every iteration. A stack whose length the devices do not divide is padded with zeros.
    """
    if x.ndim == 3:
        layers = x.shape[0]
        x = jnp.pad(x, ((0, -layers % partition.shards("weight")), (0, 0), (0, 0)))
        return _newton_schulz(partition.split_only(x, 0))[:layers]
    return _newton_schulz(partition.split_only(x, 1) if x.ndim == 4 else x)


def _newton_schulz(x: jax.Array) -> jax.Array:
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    x /= jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), TINY)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        squares = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * squares + c * squares @ squares) @ x
    return jnp.swapaxes(x, -1, -2) if tall else x
