"""The clipped value loss of PPO by hand, and in micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.data.batch import Batch
from jaxft.objectives.loss import LossSums, added
from jaxft.objectives.policy.denominators import PolicyCounts
from jaxft.objectives.policy.value import RETURNS, VALUES, value_terms, with_value_loss


def test_terms_and_slopes_by_hand():
    """Beyond the clip, only predictions on the wrong side of it have a slope."""
    values = jnp.array([1.0, 1.5, 1.5, 0.4, 1.1])
    returns, old = jnp.array([3.0, 3.0, 0.0, 2.0, 1.0]), jnp.full(5, 1.0)
    terms, clipped = value_terms(values, old, returns, 0.2)
    np.testing.assert_allclose(terms, [2.0, 1.8**2 / 2, 1.5**2 / 2, 1.6**2 / 2, 0.005], rtol=1e-6)
    np.testing.assert_array_equal(clipped, [0, 1, 0, 0, 0])
    slopes = jax.grad(lambda v: jnp.sum(value_terms(v, old, returns, 0.2)[0]))(values)
    np.testing.assert_allclose(slopes, [-2.0, 0.0, 1.5, -1.6, 0.1], rtol=1e-5)
    plain, none = value_terms(values, old, returns, None)
    np.testing.assert_allclose(plain, (values - returns) ** 2 / 2, rtol=1e-6)
    assert not none.any()


def batch_of(rows=4, length=6):
    rng = np.random.default_rng(0)
    whole = jnp.zeros((rows, length), jnp.int32)
    weights = jnp.asarray(rng.random((rows, length)) < 0.6, jnp.float32)
    arrays = {name: jnp.asarray(rng.normal(size=(rows, length)), jnp.float32) for name in (VALUES, RETURNS)}
    return Batch(whole, whole, weights, whole, whole + 1, arrays=arrays)


def test_the_mean_over_tokens_is_added_in_the_units_of_the_policy():
    """Also if each micro-batch has another number of tokens for its answers."""
    batch, rng = batch_of(), np.random.default_rng(1)
    predicted = batch.arrays[VALUES] + jnp.asarray(rng.normal(size=batch.weights_BS.shape), jnp.float32)

    def policy(rows):
        return LossSums(jnp.float32(0.5 * rows), jnp.float32(rows), jnp.float32(0), jnp.float32(0), {})

    whole = with_value_loss(policy(4), predicted, batch, vf_coef=0.3, cliprange_value=0.5)
    terms, clipped = value_terms(predicted, batch.arrays[VALUES], batch.arrays[RETURNS], 0.5)
    mask = np.asarray(batch.weights_BS) > 0
    assert float(whole.means()["loss"]) == pytest.approx(0.5 + 0.3 * np.asarray(terms)[mask].mean(), rel=1e-5)
    assert float(whole.means()["loss/value_avg"]) == pytest.approx(np.asarray(terms)[mask].mean(), rel=1e-5)
    assert float(whole.means()["val/clipfrac_avg"]) == pytest.approx(np.asarray(clipped)[mask].mean(), rel=1e-5)
    assert np.asarray(clipped)[mask].any()
    assert float(whole.trained_tokens) == mask.sum()
    counts = PolicyCounts(jnp.float32(4), jnp.float32(mask.sum()))
    parts = [
        with_value_loss(
            policy(2), predicted[rows], jax.tree.map(lambda x, rows=rows: x[rows], batch), vf_coef=0.3,
            cliprange_value=0.5, counts=counts,
        )
        for rows in (slice(0, 2), slice(2, 4))
    ]  # fmt: skip
    total = added(*parts)
    assert float(total.means()["loss"]) == pytest.approx(float(whole.means()["loss"]), rel=1e-6)
