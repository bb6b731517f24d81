"""Log-probabilities of given tokens: values and gradients of the formula, with the head trained or frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import MeshConfig
from jaxft.objectives.token_logps import token_logps
from jaxft.sharding.mesh import make_mesh_plan

B, S, D = 4, 16, 32
# On eight devices: split over all of them, over the tensor axis alone, and, being prime, not at all.
VOCABULARIES = {"wide": 1024, "narrow": 64, "odd": 61}


def drawn(vocab):
    rng = np.random.default_rng(0)
    head = {"kernel": rng.normal(size=(D, vocab)), "bias": rng.normal(size=vocab)}
    hidden = rng.normal(size=(B, S, D)) / D**0.5
    mask = rng.random((B, S)) < 0.6
    head, hidden, mask = jax.tree.map(np.float32, (head, hidden, mask))
    return head, hidden, rng.integers(0, vocab, (B, S)).astype(np.int32), mask


def unembed(head, hidden):
    return hidden @ head["kernel"] + head["bias"]


def by_formula(head, hidden, targets, mask):
    logp = jax.nn.log_softmax(unembed(head, hidden))
    return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0] * mask


def chunked(head, hidden, targets, mask, dimensions=None):
    return token_logps(unembed, head, hidden, targets, mask, dimensions=dimensions, chunk=3)


def some_loss(logps):
    """Not linear, so that the gradient of every position is weighted by another number."""
    return jnp.sum(jnp.tanh(jnp.sum(logps, axis=1)) + 0.1 * jnp.sum(logps**2, axis=1))


def with_gradient(compute, argnums):
    return jax.jit(jax.value_and_grad(lambda *data: some_loss(compute(*data)), argnums=argnums))


def assert_close(ours, expected):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1e-3, float(jnp.max(jnp.abs(b)))))


@pytest.mark.parametrize("argnums", [(1,), (0, 1)], ids=["frozen head", "trained head"])
def test_values_and_gradients_are_the_formula_s(argnums):
    data = drawn(61)
    assert_close(jax.jit(chunked)(*data), by_formula(*data))
    assert_close(with_gradient(chunked, argnums)(*data), with_gradient(by_formula, argnums)(*data))


@pytest.mark.parametrize("argnums", [(1,), (0, 1)], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("vocab", VOCABULARIES.values(), ids=VOCABULARIES)
def test_eight_devices_equal_one(vocab, argnums):
    data = drawn(vocab)
    plan = make_mesh_plan(MeshConfig(fsdp=2, context=2, tensor=2))
    dimensions = [("both",), ("weight", "tensor")]

    def on_mesh(*data):
        return chunked(*data, dimensions=dimensions)

    head, *rows = data
    everywhere = jax.sharding.NamedSharding(plan.mesh, jax.sharding.PartitionSpec())
    given = (jax.device_put(head, everywhere), *jax.device_put(rows, plan.batch_sharding()))
    assert_close(jax.jit(plan.bind(on_mesh))(*given), by_formula(*data))
    ours = jax.jit(plan.bind(with_gradient(on_mesh, argnums)))(*given)
    assert_close(ours, with_gradient(by_formula, argnums)(*data))


def test_a_frozen_head_costs_two_products_and_no_logits_of_a_whole_batch():
    """Counted in the program: with a frozen head the backward pass never meets the vocabulary again."""
    head, hidden, targets, mask = drawn(1024)

    def products(argnums):
        text = str(jax.make_jaxpr(with_gradient(chunked, argnums))(head, hidden, targets, mask))
        assert f"f32[{B},{S},1024]" not in text
        return sum("dot_general" in line for line in text.splitlines())

    assert products((1,)) == 2
    assert products((0, 1)) == 4  # forward; and again in the backward pass, where head and hidden get gradients


def test_masked_positions_have_no_log_probability_and_no_gradient():
    head, hidden, targets, mask = drawn(61)
    logps = chunked(head, hidden, targets, mask)
    assert np.all(np.asarray(logps)[mask == 0] == 0) and np.all(np.asarray(logps)[mask == 1] < 0)
    grads = jax.grad(lambda h: some_loss(chunked(head, h, targets, mask)))(hidden)
    assert np.all(np.asarray(grads)[mask == 0] == 0)
    empty = chunked(head, hidden, targets, np.zeros_like(mask))
    assert np.all(np.asarray(empty) == 0)
