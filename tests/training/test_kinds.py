"""VeRA, IA3, prompts and prefixes in training: fresh, packed, on eight devices, and step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_step import assert_same, base_model, examples

from jaxft.adapters.attach import AdapterParam, merge
from jaxft.adapters.make import attach_adapter
from jaxft.config import AdapterConfig, MeshConfig, OptimConfig
from jaxft.data.loader import Loader
from jaxft.nn.param_kind import kind_of
from jaxft.nn.storage import storage_dims_of
from jaxft.nn.virtual import virtual_ids
from jaxft.objectives.sft import sft_loss
from jaxft.optim.make import make_optimizer, make_schedule
from jaxft.optim.rates import scale_by_parameter
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.training.state import create, divide
from jaxft.training.step import make_train_step

KINDS = {
    "vera": AdapterConfig(kind="vera", r=8),
    "ia3": AdapterConfig(kind="ia3", target_modules="k_proj,v_proj,o_proj,up_proj,down_proj"),
    "prompt": AdapterConfig(kind="prompt", num_virtual_tokens=3),
    "prefix": AdapterConfig(kind="prefix", num_virtual_tokens=3),
}


@functools.cache
def module_of(kind):
    """The tiny model with adapters as if trained."""
    module = nnx.merge(*nnx.split(base_model()))
    attach_adapter(module, KINDS[kind], 0)
    state = nnx.state(module, AdapterParam)
    keys = iter(jax.random.split(jax.random.key(5), len(jax.tree.leaves(state))))
    nnx.update(module, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), state))
    return module


def batch_of(kind, rows, *, packing, length=16):
    documents = [e.prepend(virtual_ids(KINDS[kind].virtual_tokens)) for e in examples(12)]
    loader = Loader(documents, batch_size=rows, max_length=length, packing=packing, shuffle=False)
    return next(loader.eval_batches())


def gradient(kind, batch, mesh=None):
    graphdef, trainable, frozen = divide(module_of(kind))

    def total(trainable, frozen, batch):
        sums = sft_loss(nnx.merge(graphdef, trainable, frozen), batch, None)
        return sums.total, sums

    compute = jax.grad(total, has_aux=True)
    if mesh is None:
        return jax.jit(compute)(trainable, frozen, batch)
    trainable, frozen = mesh.shard((trainable, frozen), storage_dims_of(module_of(kind)))
    given = trainable, frozen, jax.device_put(batch, mesh.batch_sharding())
    return jax.jit(mesh.bind(compute))(*given)


def assert_gradients_same(ours, expected):
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected[0]))
    assert_same(ours[1].total, expected[1].total, 1e-3)  # hundreds of nats
    assert_same(ours[0], expected[0], 2e-5 * largest)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_on_eight_devices_the_gradient_is_the_same(kind):
    apart = gradient(kind, batch_of(kind, 12, packing=False))
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(apart[0]))
    packed = batch_of(kind, 8, packing=True, length=48)
    assert (packed.segments_BS.max(axis=1) > 1).any()
    assert_gradients_same(gradient(kind, packed), apart)
    mesh = make_mesh_plan(MeshConfig(fsdp=2, context=2, tensor=2))
    assert_gradients_same(gradient(kind, packed, mesh), apart)


@pytest.mark.parametrize("kind", ["vera", "ia3"])
def test_a_fresh_one_changes_no_bit_and_a_trained_one_can_be_merged(kind):
    tokens = np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)

    def logits(module):
        return np.asarray(jax.jit(lambda: module.unembed(module(tokens)[0]))())

    module = nnx.merge(*nnx.split(base_model()))
    attach_adapter(module, KINDS[kind], 0)
    np.testing.assert_array_equal(logits(module), logits(base_model()))
    module = nnx.clone(module_of(kind))
    trained = logits(module)
    merge(module)
    np.testing.assert_allclose(logits(module), trained, rtol=0, atol=1e-5)
    assert np.abs(trained - logits(base_model())).max() > 1e-3


@pytest.mark.parametrize("kind", ["vera", "prefix"])
def test_steps_lower_the_loss_and_leave_the_rest_alone(kind):
    optim = OptimConfig(learning_rate=3e-2, schedule="constant")
    schedule = make_schedule(optim, 10)
    tx = make_optimizer(optim, schedule)
    graphdef, state = create(module_of(kind), tx, seed=0)
    state = jax.tree.map(jnp.copy, state)
    frozen = jax.tree.map(np.asarray, state.frozen)
    step, batch = jax.jit(make_train_step(graphdef, sft_loss, tx, schedule)), batch_of(kind, 12, packing=False)
    losses = []
    for _ in range(6):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.01
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (frozen, state.frozen)), strict=True))


def test_rows_of_virtual_tokens_are_no_hidden_matrices():
    assert not kind_of("prompt/embeddings", 2).hidden_matrix
    assert not kind_of("layers/0/self_attn/prefix/keys", 3).hidden_matrix
    assert kind_of("layers/0/self_attn/q_proj/kernel", 3).hidden_matrix
    tx = scale_by_parameter(loraplus_lr_ratio=None, layer_decay=0.5, stacks=((0, 1),))
    updates = {"prompt/embeddings": np.ones((4, 8), np.float32)}
    scaled, _ = tx.update(updates, tx.init(updates), updates)
    np.testing.assert_allclose(scaled["prompt/embeddings"], 0.125)  # as the table of embeddings
