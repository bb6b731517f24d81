"""Every optimizer's state goes through a checkpoint bit for bit, split over devices: resumed equals uninterrupted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.config import AdamWConfig, ApolloConfig, MeshConfig, OptimConfig, choices
from jaxft.nn.storage import StorageDims
from jaxft.optim.averages import with_average
from jaxft.optim.make import make_optimizer
from jaxft.sharding.mesh import make_mesh_plan

SHAPES = {
    "embed_tokens": {"embedding": (32, 64)},
    "layers": {
        "0": {"mlp": {"down_proj": {"kernel": (2, 64, 64)}, "up_proj": {"kernel": (2, 64, 64), "bias": (2, 64)}}}
    },
    "norm": {"scale": (64,)},
}
DIMS = {
    "embed_tokens/embedding": StorageDims(("tensor", "weight")),
    "layers/0/mlp/down_proj/kernel": StorageDims(("tensor", "weight")),
    "layers/0/mlp/up_proj/kernel": StorageDims(("weight", "tensor")),
    "layers/0/mlp/up_proj/bias": StorageDims(("both",)),
    "norm/scale": StorageDims(("weight",)),
}
KINDS = [*((name, "") for name in choices(OptimConfig, "name")), ("adamw", "bfloat16"), ("average", "")]


def drawn(seed):
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    return jax.tree.map(
        lambda shape: jax.random.normal(next(keys), shape), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def optimizer(name, moments_dtype):
    averaged = name == "average"
    config = OptimConfig(
        name="sgd" if averaged else name,
        schedule="constant",
        adamw=AdamWConfig(moments_dtype=moments_dtype or "float32"),
        apollo=ApolloConfig(rank=8),
    )
    tx = make_optimizer(config, lambda step: 1e-3 / (step + 1), seed=3)
    return with_average(tx, 0.9) if averaged else tx


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(("name", "moments_dtype"), KINDS, ids=[" ".join(kind).strip() for kind in KINDS])
def test_resumed_equals_uninterrupted(name, moments_dtype, tmp_path):
    tx, plan = optimizer(name, moments_dtype), make_mesh_plan(MeshConfig(fsdp=4, tensor=2))
    params = plan.shard(drawn(0), DIMS)
    state = plan.shard({"trainable": params, "opt_state": tx.init(params)}, DIMS)
    shardings = jax.tree.map(lambda x: x.sharding, state)

    @jax.jit
    def step(state, grads):
        updates, opt_state = tx.update(grads, state["opt_state"], state["trainable"])
        state = {"trainable": optax.apply_updates(state["trainable"], updates), "opt_state": opt_state}
        return jax.lax.with_sharding_constraint(state, shardings)

    step = plan.bind(step)
    for number in (1, 2):
        state = step(state, plan.shard(drawn(number), DIMS))
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, state, {})
        restored, _ = checkpoints.restore(jax.eval_shape(lambda: state))
    restored = jax.device_put(restored, shardings)
    assert bits(restored) == bits(state)
    later = plan.shard(drawn(3), DIMS)
    assert bits(step(restored, later)) == bits(step(state, later))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state["trainable"]))
