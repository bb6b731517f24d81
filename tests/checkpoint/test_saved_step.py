"""A saved step describes itself: what a model is evaluated and exported with is read without the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.checkpoint.steps.saved_step import SavedStep, find_averages
from jaxft.config import AdamWConfig, ApolloConfig, OptimConfig, choices
from jaxft.errors import CheckpointError
from jaxft.optim.averages import evaluation_params, with_average
from jaxft.optim.make import make_optimizer
from jaxft.optim.stochastic_rounding import moments_in_bfloat16

SHAPES = {"layers": {"0": {"mlp": {"up_proj": {"kernel": (2, 64, 64), "bias": (2, 64)}}}}, "norm": {"scale": (64,)}}
KINDS = [
    *((name, {}, None) for name in choices(OptimConfig, "name")),
    ("adamw", {"adamw": AdamWConfig(moments_dtype="bfloat16")}, None),
    ("schedule_free_adamw in bfloat16", {}, None),
    ("schedule_free_adamw", {"clip_norm": None}, None),
    ("lion", {}, 0.9),
    ("apollo", {"apollo": ApolloConfig(rank=8, moments_dtype="bfloat16")}, 0.9),
]


def drawn(seed):
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    return jax.tree.map(
        lambda shape: jax.random.normal(next(keys), shape), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def trained(name, fields, decay):
    """A train state after two steps, as it is saved."""
    name, *in_bfloat16 = name.split(" ", 1)
    config = OptimConfig(name=name, schedule="constant", **({"apollo": ApolloConfig(rank=8)} | fields))
    tx = make_optimizer(config, lambda step: 1e-2, seed=3)
    tx = moments_in_bfloat16(tx, 3) if in_bfloat16 else tx  # which no config asks of this optimizer
    tx = tx if decay is None else with_average(tx, decay)
    params = drawn(0)
    opt_state = tx.init(params)
    for number in (1, 2):
        updates, opt_state = tx.update(drawn(number), opt_state, params)
        params = optax.apply_updates(params, updates)
    return {"step": jnp.int32(2), "trainable": params, "opt_state": opt_state, "key": jax.random.key(0)}


def opened(folder, state):
    with RunCheckpoints(folder, keep=1) as checkpoints:
        checkpoints.save(2, state, {"step": 2})
    with RunCheckpoints(folder, keep=1, read_only=True) as checkpoints:
        return checkpoints.open()


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x).view("u4"), np.asarray(y).view("u4")), a, b)


@pytest.mark.parametrize(
    ("name", "fields", "decay"), KINDS, ids=[" ".join(map(str, (n, *f.values(), d))) for n, f, d in KINDS]
)
def test_the_evaluated_weights_are_those_of_the_live_state_bit_for_bit(name, fields, decay, tmp_path):
    state = trained(name, fields, decay)
    saved = opened(tmp_path, state)
    expected = evaluation_params(state["opt_state"], state["trainable"])
    abstract = jax.eval_shape(lambda: state["trainable"])
    same_bits(saved.evaluated_weights(abstract), expected)
    same_bits(saved.evaluated_weights(abstract, use_average=False), evaluation_params(*_without_average(state)))
    averages = name.startswith("schedule_free_adamw") or decay is not None
    assert averages == any(bool((x != y).any()) for x, y in _leaves(expected, state["trainable"]))
    assert saved.step == 2 and saved.extra == {"step": 2}


def _without_average(state):
    opt_state = state["opt_state"]
    return getattr(opt_state, "inner", opt_state) if hasattr(opt_state, "average") else opt_state, state["trainable"]


def _leaves(a, b):
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


def test_an_average_of_an_average_is_recorded_outermost_first():
    config = OptimConfig(name="schedule_free_adamw", schedule="constant")
    tx = with_average(make_optimizer(config, lambda step: 1e-2), 0.9)
    state = {"opt_state": tx.init(drawn(0)), "trainable": drawn(0)}
    assert find_averages(state) == {"average": "opt_state/average", "schedule_free": "opt_state/inner/1"}
    assert find_averages({"trainable": drawn(0)}) == {}


def test_only_what_is_asked_for_is_read(tmp_path):
    state = trained("adamw", {}, 0.9)
    saved = opened(tmp_path, state)
    for name in ("trainable", "opt_state/average"):
        part = saved.read_parts({name: jax.eval_shape(lambda: state["trainable"])})
        assert list(part) == [name]
    same_bits(part["opt_state/average"], state["opt_state"].average)
    assert saved.read_parts({"start": {}}) == {"start": {}}


def test_a_part_that_differs_from_what_was_saved_is_refused_with_its_paths(tmp_path):
    saved = opened(tmp_path, trained("adamw", {}, None))
    other = drawn(0) | {"norm": {"bias": jnp.zeros(64)}}
    with pytest.raises(CheckpointError, match="does not fit this run") as caught:
        saved.evaluated_weights(other)
    text = str(caught.value)
    assert "trainable/norm/bias: in this run (float32[64]), not in the checkpoint" in text
    assert "trainable/norm/scale: in the checkpoint (float32[64]), not in this run" in text
    assert "opt_state" not in text


def test_a_checkpoint_that_does_not_say_where_averages_are_is_refused(tmp_path):
    state = trained("adamw", {}, None)
    saved = opened(tmp_path, state)
    older = SavedStep(saved.folder, {"layout": saved._layout, "extra": {}})
    with pytest.raises(CheckpointError, match="an earlier version of jaxft"):
        older.evaluated_weights(state["trainable"])
