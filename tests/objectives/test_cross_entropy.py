"""Chunked cross-entropy against the plain one: values, gradients, and that nothing is computed for nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import models
from jaxft.data.batch import Batch
from jaxft.nn import partition
from jaxft.objectives import vocabulary
from jaxft.objectives.cross_entropy import token_sums
from jaxft.objectives.sft import sft_loss

B, S, D, V = 3, 13, 8, 29


def drawn(kind="binary"):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, S, D)).astype(np.float32)
    head = {"kernel": rng.normal(size=(D, V)).astype(np.float32), "bias": rng.normal(size=V).astype(np.float32)}
    targets = rng.integers(0, V, (B, S)).astype(np.int32)
    weights = {
        "binary": (rng.random((B, S)) < 0.5).astype(np.float32),
        "fractional": rng.random((B, S)).astype(np.float32),
        "ones": np.ones((B, S), np.float32),
        "rare": np.eye(B, S, 3, dtype=np.float32),
        "nothing": np.zeros((B, S), np.float32),
    }[kind].copy()
    if kind == "binary":
        weights[1] = 0  # a row with nothing to train
    return head, hidden, targets, weights


def unembed(head, hidden):
    return hidden @ head["kernel"] + head["bias"]


def plain(head, hidden, targets, weights):
    logits = unembed(head, hidden)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(nll * weights), jnp.sum((logits.argmax(-1) == targets) * weights)


def chunked(head, hidden, targets, weights, chunk):
    sums = token_sums(unembed, head, hidden, targets, weights, chunk=chunk)
    return sums.nll, sums.correct


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)


@pytest.mark.parametrize(
    ("kind", "chunk"),
    [*(("binary", chunk) for chunk in (1, 3, 5, 13, 64, None))]
    + [(kind, 5) for kind in ("fractional", "ones", "rare", "nothing")],
)
def test_values_and_gradients_equal_the_plain_form(kind, chunk):
    data = drawn(kind)
    expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1), has_aux=True))(*data)
    run = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True), static_argnums=4)
    assert_close(run(*data, chunk), expected)
    # Without gradients another branch computes the sums.
    assert_close(jax.jit(chunked, static_argnums=4)(*data, chunk), expected[0])


@pytest.mark.parametrize("moving", ["hidden", "head"])
def test_each_gradient_alone(moving):
    data, at = drawn(), {"head": 0, "hidden": 1}[moving]
    expected = jax.jit(jax.grad(plain, argnums=at, has_aux=True))(*data)[0]
    assert_close(jax.jit(jax.grad(chunked, argnums=at, has_aux=True), static_argnums=4)(*data, 4)[0], expected)


def test_a_gradient_is_scaled_by_what_comes_from_above():
    data = drawn()

    def doubled(form):
        return jax.jit(jax.grad(lambda hidden: 2.5 * form(data[0], hidden, *data[2:])[0]))(data[1])

    assert_close(doubled(lambda *args: chunked(*args, 4)), doubled(plain))


def dots_with_vocabulary(fun, *args):
    """Output shapes of matrix products in the compiled gradient that make a [D, V] array."""
    jaxpr = jax.make_jaxpr(fun)(*args)
    found = []

    def visit(inner):
        for equation in inner.eqns:
            if equation.primitive.name == "dot_general" and sorted(equation.outvars[0].aval.shape) == sorted((D, V)):
                found.append(equation.outvars[0].aval.shape)
            for value in equation.params.values():
                for part in value if isinstance(value, (tuple, list)) else [value]:
                    if hasattr(part, "jaxpr"):
                        visit(part.jaxpr)
                    elif hasattr(part, "eqns"):
                        visit(part)

    visit(jaxpr.jaxpr)
    return found


def test_a_frozen_head_costs_no_gradient_product():
    head, hidden, targets, weights = drawn()
    by_hidden = jax.grad(lambda hidden: chunked(head, hidden, targets, weights, 4)[0])
    by_both = jax.grad(lambda head, hidden: chunked(head, hidden, targets, weights, 4)[0], argnums=(0, 1))
    assert not dots_with_vocabulary(by_hidden, hidden)
    assert dots_with_vocabulary(by_both, head, hidden)


def test_logits_of_all_positions_never_exist():
    head, hidden, targets, weights = drawn()
    text = str(jax.make_jaxpr(jax.grad(lambda h: chunked(head, h, targets, weights, 4)[0]))(hidden))
    assert f"f32[{B},4,{V}]" in text
    assert f"f32[{B},{S},{V}]" not in text


def test_untrained_positions_may_hold_anything():
    head, hidden, targets, weights = drawn("binary")
    other = np.where(weights[..., None] == 0, 1e4, hidden)
    assert_close(
        chunked(head, other, np.where(weights == 0, 0, targets), weights, 4), chunked(head, hidden, targets, weights, 4)
    )


def test_chunks_without_trained_positions_are_skipped():
    head, hidden, targets, weights = drawn("rare")
    ran = []

    def watched(head, hidden):
        jax.debug.callback(lambda: ran.append(1))
        return unembed(head, hidden)

    run = jax.jit(lambda: token_sums(watched, head, hidden, targets, weights, chunk=1))
    sums = run()
    jax.effects_barrier()
    # One trained position in each row, gathered to the front: one chunk of thirteen.
    assert len(ran) == 1
    np.testing.assert_allclose(sums.nll, plain(head, hidden, targets, weights)[0], rtol=1e-5)


def test_large_logits_do_not_overflow():
    head, hidden, targets, weights = drawn()
    sums = chunked(head, 1e3 * hidden, targets, weights, 4)
    np.testing.assert_allclose(sums[0], plain(head, 1e3 * hidden, targets, weights)[0], rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_sft_loss_is_the_sum_over_trained_tokens(smoke_config, tied):
    from flax import nnx

    config = models.config_from_hf(smoke_config | {"tie_word_embeddings": tied, "vocab_size": 61})
    graphdef, state = nnx.split(models.random_model(config, seed=0))
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 61, (2, 2, 10))
    weights = (rng.random((2, 10)) < 0.6).astype(np.float32)
    segments = np.ones((2, 10), int)
    segments[1, 7:] = 0
    weights[1, 7:] = 0
    batch = Batch(tokens, targets, weights, np.broadcast_to(np.arange(10), (2, 10)), segments)

    def ours(state):
        sums = sft_loss(nnx.merge(graphdef, state), batch, None)
        return sums.total, sums

    def by_hand(state):
        module = nnx.merge(graphdef, state)
        logits = module.unembed(module(jnp.asarray(tokens), batch.positions_BS, jnp.asarray(segments))[0])
        logprobs = jax.nn.log_softmax(logits)
        return -jnp.sum(jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0] * weights)

    (total, sums), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(state)
    expected, expected_grads = jax.jit(jax.value_and_grad(by_hand))(state)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert_close(grads, expected_grads)
    assert (float(sums.weight), float(sums.tokens)) == (weights.sum(), 17)
    assert float(sums.trained_tokens) == weights.sum()
    assert 0 <= float(sums.metrics["mean_token_accuracy"].total) <= weights.sum()


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_trained_positions_come_first_in_their_order_and_tpus_sort_nothing(monkeypatch, platform):
    monkeypatch.setattr(partition, "platform", lambda: platform)
    trained = np.random.default_rng(0).random((5, 33)) < np.array([0.0, 0.1, 0.5, 0.9, 1.0])[:, None]
    order, inverse = jax.jit(vocabulary._trained_first)(trained)
    expected = np.argsort(~trained, axis=1, stable=True)
    np.testing.assert_array_equal(order, expected)
    np.testing.assert_array_equal(inverse, np.argsort(expected, axis=1))
    head, hidden, targets, weights = drawn()
    text = str(jax.make_jaxpr(jax.grad(lambda h: chunked(head, h, targets, weights, 4)[0]))(hidden))
    assert text.count(" sort[") == (platform == "cpu")
