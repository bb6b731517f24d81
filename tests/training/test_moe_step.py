"""A training step of a model with experts: on eight devices as on one, and compiled ahead of time for a TPU slice."""

import functools
import importlib.util

import jax
import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.config import AdamWConfig, MeshConfig, OptimConfig
from jaxft.data.batch import Batch
from jaxft.hardware.groups import collectives
from jaxft.hardware.hlo import parse
from jaxft.nn.storage import storage_dims_of
from jaxft.objectives.router import RouterCoefficients
from jaxft.objectives.sft import sft_loss
from jaxft.optim.make import make_optimizer, make_schedule
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.training.state import create
from jaxft.training.step import make_train_step

SIZES = {
    "model_type": "mixtral", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 8,
    "num_experts_per_tok": 2, "initializer_range": 0.2,
}  # fmt: skip
ROUTER = RouterCoefficients(load_balancing=0.5, z_loss=0.05)


def setup(sizes, *, dtype="float32", remat="none"):
    """(step, function that makes its state at the start)."""
    optim = OptimConfig(adamw=AdamWConfig(eps=1e-1), schedule="constant")
    schedule = make_schedule(optim, 10)
    tx = make_optimizer(optim, schedule)
    config = models.config_from_hf(sizes)
    graphdef = nnx.split(models.abstract_model(config, dtype=dtype, remat=remat))[0]
    loss = functools.partial(sft_loss, router=ROUTER)

    def start():
        return create(models.random_model(config, seed=0, dtype=dtype, param_dtype="float32", remat=remat), tx, 0)[1]

    return make_train_step(graphdef, loss, tx, schedule), start


def make_batch(rows=8, length=12):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 96, (rows, length)).astype(np.int32)
    real = np.arange(length) < rng.integers(4, length + 1, (rows, 1))
    weights = (real & np.roll(real, -1, axis=1)).astype(np.float32)
    weights[:, -1] = 0
    positions = np.where(real, np.arange(length), 0).astype(np.int32)
    return Batch(tokens, np.roll(tokens, -1, axis=1), weights, positions, real.astype(np.int32))


@functools.cache
def on_one_device():
    step, start = setup(SIZES)
    return jax.device_get(jax.jit(step)(start(), make_batch()))


@pytest.mark.parametrize(
    ("mesh", "remat"),
    [
        (MeshConfig(fsdp=2, expert=4), "dots"),
        (MeshConfig(data=2, fsdp=2, expert=2), "full"),
        (MeshConfig(fsdp=8), "none"),
        (MeshConfig(fsdp=1, expert=2, context=2, tensor=2), "none"),
    ],
)
def test_eight_devices_equal_one(mesh, remat):
    plan = make_mesh_plan(mesh)
    step, start = setup(SIZES, remat=remat)
    state = plan.shard(start(), storage_dims_of(models.abstract_model(models.config_from_hf(SIZES))))
    batch = jax.device_put(make_batch(), plan.batch_sharding())
    out, metrics = jax.jit(plan.bind(step))(state, batch)
    expected, expected_metrics = on_one_device()
    assert metrics["load_balancing_loss"] > 2
    for name in expected_metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5, atol=1e-5, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
        jax.tree.leaves(out.trainable),
        jax.tree.leaves(expected.trainable),
    )


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiles for TPU with libtpu")
def test_the_step_compiles_for_a_tpu_slice(monkeypatch):
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    plan = make_mesh_plan(MeshConfig(fsdp=2, expert=4), devices)
    step, start = setup(SIZES | {"hidden_size": 128, "intermediate_size": 128}, dtype="bfloat16", remat="full")
    shapes, dims = jax.eval_shape(start), storage_dims_of(models.abstract_model(models.config_from_hf(SIZES)))
    shardings = plan.shardings(shapes, dims)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=plan.batch_sharding()), make_batch(length=40)
    )
    text = jax.jit(plan.bind(step), donate_argnums=0).lower(state, batch).compile().as_text()
    # 40 tokens of a chip choose two experts each. Of 160 rows, those chosen, 104 fit into the window of a shard.
    sent = [array for array, _ in collectives(parse(text), "ragged-all-to-all", 8)]
    assert {array.dims[0] for array in sent if array.dtype == "bf16"} == {80, 104}
    gathered = [array.dims for array, _ in collectives(parse(text), "all-gather", 8)]
    assert not any(dims[-2:] in ((160, 128), (320, 128)) for dims in gathered)
    kernels = [call.scope for c in parse(text).computations.values() for call in c.instructions.values()]
    assert any(scope.endswith("jit(gmm)/pallas_call") for scope in kernels)
