"""Moments in bfloat16: rounded to a neighbour, right on average, and therefore never stuck."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.config import AdamWConfig, OptimConfig
from jaxft.optim.make import make_optimizer, make_schedule
from jaxft.optim.stochastic_rounding import moments_in_bfloat16, stochastic_round


def test_a_number_goes_to_one_of_its_neighbours_and_stays_on_average():
    # 1 + 2^-9 lies a quarter of the way from 1 to the next number of bfloat16, 1 + 2^-7.
    x = jnp.full((100_000,), 1 + 2**-9, jnp.float32)
    rounded = np.asarray(stochastic_round(x, jax.random.key(0)).astype(jnp.float32))
    assert set(np.unique(rounded)) == {1.0, 1 + 2**-7}
    # Five standard errors of a share of 1/4 in 100,000 draws.
    assert np.mean(rounded > 1) == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 100_000) ** 0.5)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, float("inf"), float("-inf")])
def test_what_bfloat16_holds_is_kept(value):
    x = jnp.full((1000,), value, jnp.float32)
    assert (np.asarray(stochastic_round(x, jax.random.key(0)).astype(jnp.float32)) == value).all()
    assert np.isnan(np.asarray(stochastic_round(x * jnp.nan, jax.random.key(0)).astype(jnp.float32))).all()


def test_a_second_moment_follows_its_gradients():
    tx = moments_in_bfloat16(optax.scale_by_adam(b2=0.999), seed=0)
    params = {"kernel": jnp.zeros((64, 64))}
    state = tx.init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype("bfloat16")}
    step = jax.jit(lambda state: tx.update({"kernel": jnp.ones((64, 64))}, state, params)[1])
    for _ in range(200):
        state = step(state)
    mean = float(jnp.mean(state.inner.nu["kernel"].astype(jnp.float32)))
    assert mean == pytest.approx(1 - 0.999**200, rel=0.01)
    # Rounded to the nearest, it stops where a thousandth of the way to 1 is less than half a step of bfloat16.
    nearest = jnp.bfloat16(0)
    for _ in range(200):
        nearest = (0.999 * nearest.astype(jnp.float32) + 0.001).astype(jnp.bfloat16)
    assert float(nearest) != pytest.approx(1 - 0.999**200, rel=0.01)


def test_the_noise_is_the_same_again():
    config = OptimConfig(adamw=AdamWConfig(moments_dtype="bfloat16"), schedule="constant")
    tx = make_optimizer(config, make_schedule(config, 10), seed=3)
    params = {"kernel": jax.random.normal(jax.random.key(0), (32, 32))}

    def run(steps, state):
        for _ in range(steps):
            _, state = tx.update(params, state, params)
        return state

    whole = run(4, tx.init(params))
    jax.tree.map(np.testing.assert_array_equal, run(2, run(2, tx.init(params))), whole)
    other = make_optimizer(config, make_schedule(config, 10), seed=4)
    _, state = other.update(params, run(3, tx.init(params)), params)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True))
