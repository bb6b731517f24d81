"""Spikes: told by a plain formula, decided on the devices, and a run without the update is what remains."""

import functools
import json
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxft import models
from jaxft.assets import ASSETS
from jaxft.checkpoint.hf import read_json
from jaxft.config import AdapterConfig, with_overrides
from jaxft.data.batch import Example
from jaxft.data.loader import Loader
from jaxft.errors import ConfigError
from jaxft.objectives.loss import LossSums
from jaxft.objectives.sft import sft_loss
from jaxft.runs.build import attach_adapter
from jaxft.training.log import NoLog
from jaxft.training.loop import Cadence, Hooks, fit
from jaxft.training.spikes import SpikeError, SpikeGuard, limit
from jaxft.training.state import TrainState, create
from jaxft.training.step import make_train_step, make_update

SPIKE = 14  # the step whose batch is noise
TX = optax.sgd(0.3, momentum=0.9)


def by_hand(values, threshold):
    """Median and median absolute deviation, from the standard library."""
    middle = statistics.median(values)
    deviation = statistics.median([abs(value - middle) for value in values]) * 1.4826
    return middle + threshold * max(deviation, abs(middle) / 100)


@pytest.mark.parametrize("seed", range(5))
def test_the_limit_is_the_plain_formula_and_outliers_hardly_move_it(seed):
    values = np.random.default_rng(seed).normal(3, 0.2, 20 + seed).tolist()
    assert limit(values, 6.0, len(values)) == pytest.approx(by_hand(values, 6.0), rel=1e-12)
    outlier = limit([*values[:-1], 1e6], 6.0, len(values))
    assert outlier == pytest.approx(by_hand([*values[:-1], 1e6], 6.0), rel=1e-12) and outlier < 6
    assert limit(values, 6.0, len(values) + 1) == math.inf
    assert limit([0.0] * 20, 6.0, 20) == math.inf


def test_a_guard_of_rewards_looks_at_the_gradient_alone_and_not_at_empty_steps():
    guard, progress = SpikeGuard(mode="skip", threshold=5.0, window=8, by_loss=False), {}
    for step in range(1, 30):
        trained = float(step % 2)
        guard.add(step, {"loss": 0.0, "grad_norm": trained * (1 + step / 100), "trained_tokens": trained}, progress)
    loss, norm = guard.limits(progress)
    expected = by_hand([1 + step / 100 for step in range(15, 30, 2)], 5.0)
    assert loss == math.inf and norm == np.float32(expected)


@pytest.mark.parametrize(
    ("loss", "scale", "limits"),
    [(2.0, 1.0, (1.9, 9.0)), (2.0, 1.0, (3.0, 0.1)), (math.nan, 1.0, (9.0, 9.0)), (math.inf, 1.0, (math.inf, 9.0)),
     (2.0, math.inf, (9.0, math.inf)), (2.0, math.nan, (9.0, 9.0)), (2.0, 3e38, (math.inf, math.inf))],
)  # fmt: skip
def test_the_update_of_a_spike_is_not_made(loss, scale, limits):
    """Too high a loss or gradient, not finite ones, and an update after which the weights would not be finite."""
    trainable = {"w": jnp.ones((4, 4)), "v": jnp.ones(3)}
    tx = optax.chain(optax.scale(100.0), optax.trace(0.9), optax.scale_by_learning_rate(optax.constant_schedule(0.1)))
    start = TrainState(jnp.int32(0), trainable, nnx.State({}), tx.init(trainable), jax.random.key(0))
    sums = LossSums(jnp.float32(loss), jnp.float32(1), jnp.float32(4), jnp.float32(4), {})
    grads = jax.tree.map(lambda x: x * scale * 0.25, trainable)
    bounds = np.array(limits, np.float32)
    with np.errstate(all="ignore"):
        after, metrics = make_update(tx, lambda step: 0.1, on_spike="skip")(start, grads, sums, bounds)
    assert metrics["spikes"] == metrics["skipped_updates"] == 1 and int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, after.trainable, trainable)
    kept, before = (jax.tree.leaves(s.opt_state[1]) for s in (after, start))
    jax.tree.map(np.testing.assert_array_equal, kept, before)
    calm, metrics = make_update(tx, lambda step: 0.1, on_spike="skip")(
        start, jax.tree.map(lambda x: x * 0.25, trainable), sums._replace(total=jnp.float32(2)), np.float32([9, 9])
    )
    assert metrics["spikes"] == 0 and not np.array_equal(calm.trainable["w"], trainable["w"])


@functools.cache
def base_model():
    hf = read_json(str(ASSETS / "smoke" / "config.json"))
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return models.random_model(models.config_from_hf(hf | sizes), seed=0)


def batch_of(number):
    """Batches of one short pattern; that of step SPIKE has noise for labels."""
    rng = np.random.default_rng(number)
    rows = [np.resize(np.int32([3, 5, 7, rng.integers(0, 4)]), 12) for _ in range(4)]
    if number == SPIKE - 1:
        rows = [rng.integers(0, 61, 12).astype(np.int32) for _ in range(4)]
    mask = np.array([0, *[1] * 11], np.uint8)
    documents = [Example(tokens=tokens, mask=mask, row=row) for row, tokens in enumerate(rows)]
    return Loader(documents, batch_size=4, max_length=12, packing=False, shuffle=False).batch(0)


@functools.cache
def started(mode):
    """(jitted step, state) of a tiny model whose loss falls fast."""
    module = nnx.merge(*nnx.split(base_model()))
    attach_adapter(module, AdapterConfig(kind="none"), 0)
    graphdef, state = create(module, TX, seed=0)
    return jax.jit(make_train_step(graphdef, sft_loss, TX, lambda step: 0.3, on_spike=mode)), state


def trained(mode, *, batch=batch_of, total=20, start=0, state=None, progress=None, saved=None):
    step, fresh = started(mode)
    hooks = Hooks(
        train_step=step,
        batch=lambda state, number: batch(number),
        evaluate=None,
        save=lambda number, state, progress, held_out: (
            None if saved is None else saved.update({number: (state, json.loads(json.dumps(progress)))})
        ),
        preempted=lambda: False,
        spikes=SpikeGuard(mode=mode, threshold=10.0, window=8),
    )
    cadence = Cadence(total_steps=total, steps_per_epoch=9.0, log_every=1, eval_every=None, save_every=1)
    return fit(fresh if state is None else state, hooks, cadence, NoLog(), start=start, progress=progress or {})[0]


def assert_equal_weights(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.trainable, other.trainable)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(one.opt_state), jax.tree.leaves(other.opt_state))


def test_a_run_with_a_skipped_spike_is_the_run_without_that_batch_bit_for_bit():
    saved = {}
    state = trained("skip", saved=saved)
    assert saved[20][1]["spikes"] == saved[20][1]["skipped_updates"] == 1 and int(state.step) == 20
    without = trained("skip", batch=lambda number: batch_of(number + (number >= SPIKE - 1)), total=19)
    assert_equal_weights(state, without)
    # Also when it is interrupted: from the step before the spike, and from the one after it.
    for step in (SPIKE - 1, SPIKE):
        again = trained("skip", start=step, state=saved[step][0], progress=saved[step][1])
        assert_equal_weights(again, state)


def test_stop_keeps_the_state_before_the_spike_from_which_skip_goes_on():
    saved = {}
    with pytest.raises(SpikeError, match=f"spike at step {SPIKE}: loss .* step {SPIKE - 1} is saved"):
        trained("stop", saved=saved)
    state, progress = saved[SPIKE - 1]
    assert int(state.step) == SPIKE - 1 and max(saved) == SPIKE - 1
    assert_equal_weights(trained("skip", start=SPIKE - 1, state=state, progress=progress), trained("skip"))


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"train.on_spike": "skip", "train.spike_window": 4}, "spike_window.*8 or more"),
        ({"train.on_spike": "skip", "train.spike_threshold": 0.0}, "spike_threshold.*above zero"),
        ({"train.spike_window": 30}, "train.spike_window.*train.on_spike"),
        ({"train.on_spike": "ignore"}, "on_spike.*warn"),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides, match):
    with pytest.raises(ConfigError, match=match):
        with_overrides({"model.path": "m", "data.train": "d", **overrides})
