"""Whole training steps with every optimizer: the loss falls, and eight devices do what one does."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.assets import ASSETS
from jaxft.checkpoint.hf import read_json
from jaxft.config import AdapterConfig, MeshConfig, OptimConfig, choices, resolve
from jaxft.data.batch import Batch
from jaxft.methods.parts.sequences import evaluated_weights
from jaxft.nn.storage import storage_dims_of
from jaxft.runs.build import attach_adapter, make_step, make_tx
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.training.state import create
from jaxft.trees import flatten

OPTIMIZERS = choices(OptimConfig, "name")
RATES = {"sgd": 1.0, "lion": 1e-3, "muon": 1e-2, "schedule_free_adamw": 1e-2}
STEPS = 8


def module_of(adapter):
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1}
    module = models.random_model(
        models.config_from_hf(read_json(str(ASSETS / "smoke" / "config.json")) | sizes), seed=0
    )
    attach_adapter(module, AdapterConfig(kind=adapter, r=4), 0)
    return module


def batch_of():
    tokens = np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
    return Batch(tokens, np.roll(tokens, -1, 1), np.ones((8, 16), np.float32), positions, np.ones((8, 16), np.int32))


def run(name, mesh=None, adapter="none", steps=STEPS, train=None, sft=None):
    """(losses of every step, config, state) of training on one batch over and over."""
    optim = {"name": name, "schedule": "constant", "learning_rate": RATES.get(name, 3e-3), "clip_norm": 1.0}
    if name == "apollo":
        optim["apollo"] = {"rank": 16}
    config = resolve(
        {
            "model": {"path": "x"}, "data": {"train": "x"}, "adapter": {"kind": adapter}, "optim": optim,
            "train": train or {}, "method": {"sft": sft or {}},
        }
    )  # fmt: skip
    module, schedule = module_of(adapter), lambda step: config.optim.learning_rate
    tx = make_tx(config, module, schedule)
    graphdef, state = create(module, tx, 0)
    step, batch = make_step(config, module, graphdef, tx, schedule), batch_of()
    state = jax.tree.map(jax.numpy.copy, state)
    if mesh is None:
        step = jax.jit(step)
    else:
        state, batch = mesh.shard(state, storage_dims_of(module)), jax.device_put(batch, mesh.batch_sharding())
        out = jax.tree.map(lambda x: x.sharding, state)
        step = jax.jit(mesh.bind(step), donate_argnums=0, out_shardings=(out, None))
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, config, state, graphdef


@functools.cache
def adamw_falls():
    losses = run("adamw")[0]
    return losses[0] - losses[-1]


@pytest.mark.parametrize("name", ["adamw_8bit", "apollo", "muon"])
def test_the_loss_falls_about_as_with_adamw(name):
    losses = run(name)[0]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 0.6 * adamw_falls()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("adamw_8bit", "apollo", "muon")])
def test_the_loss_falls(name):
    losses = run(name)[0]
    assert losses[-1] < losses[0] - 0.3 * adamw_falls()


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_eight_devices_equal_one(name, adapter):
    if name == "apollo" and adapter == "lora":
        pytest.skip("refused")
    one, _, alone, _ = run(name, adapter=adapter, steps=2)
    mesh = make_mesh_plan(MeshConfig(fsdp=4, tensor=2))
    many, _, state, _ = run(name, mesh, adapter, steps=2)
    np.testing.assert_allclose(many, one, rtol=1e-4)
    for path, value in flatten(state.trainable)[0].items():
        # Signs and codes turn where a sum is nearly nothing: few numbers, each by a step at most.
        far = np.abs(np.asarray(value) - np.asarray(flatten(alone.trainable)[0][path])) > 1e-4
        assert far.mean() < (0.05 if name == "lion" else 0.01), path


def test_an_average_is_trained_beside_and_evaluated():
    sft = {"z_loss": 1e-3, "neftune_noise_alpha": 5.0}
    _, config, state, graphdef = run("sgd", adapter="lora", steps=3, train={"ema_decay": 0.5}, sft=sft)
    average = evaluated_weights(config, state)
    assert jax.tree.structure(average) == jax.tree.structure(state.trainable)
    differs = [bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, (average, state.trainable)), strict=True)]
    assert any(differs)
    nnx.merge(graphdef, average, state.frozen)
