"""Sums of a loss over parts of a batch: added up, but of maxima the larger one."""

import jax.numpy as jnp
import numpy as np

from jaxft.evaluation.held_out import held_out_metrics
from jaxft.objectives.loss import LossSums, Ratio, added


def sums(total, weight, largest):
    numbers = (jnp.float32(x) for x in (total, weight, 10, weight))
    return LossSums(*numbers, {"share": Ratio(jnp.float32(weight), jnp.float32(16))}, {"largest": jnp.float32(largest)})


def test_parts_are_added_up_and_the_larger_maximum_is_kept():
    gradients, whole = added(([jnp.ones(2)], sums(3, 1, 0.5)), ([jnp.ones(2)], sums(1, 3, 0.25)))
    np.testing.assert_array_equal(gradients[0], [2, 2])
    assert {name: float(x) for name, x in whole.means().items()} == {"loss": 1.0, "share": 0.125, "largest": 0.5}
    assert float(whole.tokens) == 20 and float(whole.trained_tokens) == 4


def test_held_out_maxima_are_those_of_all_batches():
    metrics = held_out_metrics(lambda batch: sums(1, 1, batch), [0.25, 2.0, 0.5])
    assert metrics == {"eval_loss": 1.0, "eval_share": 3 / 48, "eval_largest": 2.0, "eval_tokens": 3.0}
