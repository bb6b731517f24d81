"""APOLLO against its algorithm written out, matrix by matrix."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.optim import apollo
from jaxft.optim.apollo import scale_by_apollo

RANK, B1, B2, EPS = 4, 0.9, 0.99, 1e-8
SHAPES = {"layers/0/mlp/up_proj/kernel": (2, 12, 20), "layers/0/mlp/down_proj/kernel": (2, 20, 12)}


def projections(path, updates):
    key = jax.random.fold_in(jax.random.key(7), zlib.crc32(path.encode()))
    draw = lambda number: jax.random.normal(jax.random.fold_in(key, number), (RANK, 12))  # noqa: E731
    return [np.asarray(draw(update // apollo.GAP)) / RANK**0.5 for update in range(updates)]


def by_algorithm(path, grads):
    """Algorithm 1 of the paper on one matrix after another."""
    out = np.zeros((len(grads), *SHAPES[path]), np.float32)
    for layer in range(2):
        mu = nu = norm = 0.0
        for t, (grad, projection) in enumerate(zip(grads, projections(path, len(grads)), strict=True), start=1):
            # The smaller side first, as the paper has it.
            g = grad[layer] if path.endswith("up_proj/kernel") else grad[layer].T
            low = projection @ g
            mu, nu = B1 * mu + (1 - B1) * low, B2 * nu + (1 - B2) * low**2
            scaled = (mu / (1 - B1**t)) / (np.sqrt(nu / (1 - B2**t)) + EPS)
            update = g * (np.linalg.norm(scaled, axis=0) / np.linalg.norm(low, axis=0))
            if t > 1:
                update *= min(1.0, 1.01 * norm / np.linalg.norm(update))
            norm = np.linalg.norm(update)
            out[t - 1, layer] = update if path.endswith("up_proj/kernel") else update.T
    return out


@pytest.mark.parametrize("gap", [200, 2])
def test_steps_are_the_algorithm_s(gap, monkeypatch):
    monkeypatch.setattr(apollo, "GAP", gap)
    rng = np.random.default_rng(0)
    grads = [
        {path: np.float32(rng.normal(size=shape) * 10.0 ** rng.integers(-2, 2)) for path, shape in SHAPES.items()}
        for _ in range(5)
    ]
    tx = scale_by_apollo(rank=RANK, b1=B1, b2=B2, eps=EPS, seed=7)
    state, seen = tx.init({path: jnp.zeros(shape) for path, shape in SHAPES.items()}), []
    for grad in grads:
        updates, state = tx.update(grad, state)
        seen.append(updates)
    for path in SHAPES:
        expected = by_algorithm(path, [grad[path] for grad in grads])
        for step, updates in enumerate(seen):
            np.testing.assert_allclose(updates[path], expected[step], rtol=1e-4, atol=1e-5, err_msg=f"{step} {path}")
    assert {x["low"].shape for x in state.mu.values()} == {(2, RANK, 20)}


def test_a_projection_keeps_norms_on_average():
    grad = jax.random.normal(jax.random.key(1), (64, 2000))
    low = apollo._project(grad, 32, jax.random.key(0))
    ratio = np.asarray(jnp.sum(low**2, 0) / jnp.sum(grad**2, 0))
    # Over columns of one projection of variance 1 / r: its squared singular values average 1.
    assert ratio.mean() == pytest.approx(1.0, abs=0.1)
