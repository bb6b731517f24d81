"""Log-probabilities of given tokens, entropies and sums of squares: values and gradients of the formulas."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import MeshConfig
from jaxft.objectives.token_logps import token_logps, token_statistics
from jaxft.sharding.mesh import make_mesh_plan

B, S, D = 4, 16, 32
# On eight devices: split over all of them, over the tensor axis alone, and, being prime, not at all.
VOCABULARIES = {"wide": 1024, "narrow": 64, "odd": 61}
HEADS = pytest.mark.parametrize("argnums", [(1,), (0, 1)], ids=["frozen head", "trained head"])


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


def statistics_by_formula(head, hidden, targets, mask, temperature):
    logp = jax.nn.log_softmax(unembed(head, hidden) / temperature)
    selected = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
    entropies = -jnp.sum(jnp.exp(logp) * logp, -1)
    return tuple(x * mask for x in (selected, entropies, jax.nn.logsumexp(2 * logp, -1)))


def chunked_statistics(*data, temperature, entropy_gradient=True, dimensions=None):
    settings = {"temperature": temperature, "entropy_gradient": entropy_gradient}
    return tuple(token_statistics(unembed, *data, **settings, dimensions=dimensions, chunk=3))


def loss_of_statistics(logps, entropies, log_sum_squares):
    """Another one than `some_loss` adds of the entropies; the sums of squares are constants."""
    weights = jnp.exp(jax.lax.stop_gradient(log_sum_squares))
    return some_loss(logps * weights) + jnp.sum(jnp.cos(entropies)) + jnp.sum(entropies[:, ::2] * logps[:, ::2])


def gradient_of_statistics(compute, argnums):
    return jax.jit(jax.grad(lambda *data: loss_of_statistics(*compute(*data)), argnums=argnums))


def some_loss(logps):
    """Not linear, so that the gradient of every position is weighted by another number."""
    return jnp.sum(jnp.tanh(jnp.sum(logps, axis=1)) + 0.1 * jnp.sum(logps**2, axis=1))


def with_gradient(compute, argnums):
    return jax.jit(jax.value_and_grad(lambda *data: some_loss(compute(*data)), argnums=argnums))


def assert_close(ours, expected):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1e-3, float(jnp.max(jnp.abs(b)))))


@HEADS
def test_values_and_gradients_are_the_formula_s(argnums):
    data = drawn(61)
    assert_close(jax.jit(chunked)(*data), by_formula(*data))
    assert_close(with_gradient(chunked, argnums)(*data), with_gradient(by_formula, argnums)(*data))


@HEADS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_statistics_and_their_gradients_are_the_formulas(argnums, temperature):
    data = drawn(61)
    ours, formulas = (partial(f, temperature=temperature) for f in (chunked_statistics, statistics_by_formula))
    assert_close(jax.jit(ours)(*data), formulas(*data))
    assert_close(gradient_of_statistics(ours, argnums)(*data), gradient_of_statistics(formulas, argnums)(*data))


@HEADS
def test_entropies_are_constants_unless_their_gradient_is_requested(argnums):
    data = drawn(61)

    def constants(*data):
        logps, *rest = statistics_by_formula(*data, temperature=1.3)
        return (logps, *jax.lax.stop_gradient(rest))

    ours = partial(chunked_statistics, temperature=1.3, entropy_gradient=False)
    assert_close(gradient_of_statistics(ours, argnums)(*data), gradient_of_statistics(constants, argnums)(*data))
    only = jax.jit(jax.grad(lambda *data: jnp.sum(ours(*data)[1]), argnums=argnums))(*data)
    assert all(not np.any(x) for x in jax.tree.leaves(only))


def test_the_temperature_divides_the_logits():
    data = drawn(61)
    logps, _, _ = statistics_by_formula(*data, temperature=2.0)
    assert_close(token_logps(unembed, *data, temperature=2.0, chunk=5), logps)
    with pytest.raises(ValueError, match=r"temperature=0 divides the logits, so it must be above zero"):
        token_logps(unembed, *data, temperature=0)


def test_a_logit_of_minus_infinity_adds_nothing_to_the_entropy():
    head, hidden, targets, mask = drawn(61)
    head["bias"][7] = -np.inf
    targets = np.where(targets == 7, 8, targets)
    _, entropies, squares = chunked_statistics(head, hidden, targets, mask, temperature=1.0)
    kept = {name: np.delete(x, 7, axis=-1) for name, x in head.items()}
    _, *expected = statistics_by_formula(kept, hidden, np.zeros_like(targets), mask, temperature=1.0)
    assert_close((entropies, squares), tuple(expected))
    gradient = jax.grad(lambda h: jnp.sum(chunked_statistics(head, h, targets, mask, temperature=1.0)[1]))(hidden)
    assert np.all(np.isfinite(gradient))


@HEADS
@pytest.mark.parametrize("vocab", VOCABULARIES.values(), ids=VOCABULARIES)
def test_statistics_on_eight_devices_equal_one(vocab, argnums):
    data = drawn(vocab)
    plan = make_mesh_plan(MeshConfig(fsdp=2, context=2, tensor=2))
    on_mesh = partial(chunked_statistics, temperature=0.7, dimensions=[("both",), ("weight", "tensor")])
    head, *rows = data
    everywhere = jax.sharding.NamedSharding(plan.mesh, jax.sharding.PartitionSpec())
    given = (jax.device_put(head, everywhere), *jax.device_put(rows, plan.batch_sharding()))
    formulas = partial(statistics_by_formula, temperature=0.7)

    def both(compute):
        return jax.jit(lambda *data: (compute(*data), gradient_of_statistics(compute, argnums)(*data)))

    assert_close(jax.jit(plan.bind(both(on_mesh)))(*given), both(formulas)(*data))


@HEADS
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

    def products(gradient):
        text = str(jax.make_jaxpr(gradient)(head, hidden, targets, mask))
        assert f"f32[{B},{S},1024]" not in text
        return sum("dot_general" in line for line in text.splitlines())

    assert products(with_gradient(chunked, (1,))) == 2
    assert (
        products(with_gradient(chunked, (0, 1))) == 4
    )  # forward; and again backward, where head and hidden get theirs
    values = partial(chunked_statistics, temperature=0.7, entropy_gradient=False)
    assert products(gradient_of_statistics(values, (1,))) == 2
    assert products(gradient_of_statistics(values, (0, 1))) == 4
    through = partial(chunked_statistics, temperature=0.7)
    assert products(gradient_of_statistics(through, (1,))) == 3  # the slope of the entropy is another vector
    assert products(gradient_of_statistics(through, (0, 1))) == 4
    assert products(lambda *data: through(*data)) == 1


def test_masked_positions_have_no_log_probability_and_no_gradient():
    head, hidden, targets, mask = drawn(61)
    logps = chunked(head, hidden, targets, mask)
    assert np.all(np.asarray(logps)[mask == 0] == 0) and np.all(np.asarray(logps)[mask == 1] < 0)
    grads = jax.grad(lambda h: some_loss(chunked(head, h, targets, mask)))(hidden)
    assert np.all(np.asarray(grads)[mask == 0] == 0)
    empty = chunked(head, hidden, targets, np.zeros_like(mask))
    assert np.all(np.asarray(empty) == 0)
