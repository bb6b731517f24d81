"""Routers against the rule of each kind, stated token by token in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn.experts.router import RouterShape, route

SHAPES = {
    "softmax": RouterShape(chosen=2, renormalize=False),
    "softmax_scaled": RouterShape(chosen=2, renormalize=True, scale=2.5),
    "softmax_biased": RouterShape(chosen=3, renormalize=True, choice_bias=True, least_sum=0.4),
    "softmax_grouped": RouterShape(chosen=3, renormalize=False, groups=4, chosen_groups=2, scale=16.0),
    "sigmoid": RouterShape(chosen=2, renormalize=True, scores="sigmoid", epsilon=0.3),
    "sigmoid_biased": RouterShape(chosen=2, renormalize=False, scores="sigmoid", choice_bias=True, scale=0.5),
    "sigmoid_grouped": RouterShape(
        chosen=3, renormalize=True, scores="sigmoid", choice_bias=True, groups=4, chosen_groups=2, group_best=2,
        epsilon=1e-20, scale=2.5,
    ),
}  # fmt: skip
EXPERTS = 12


def stated(logits, shape, bias):
    """(chosen experts, weights) of one token, best first."""
    scores = 1 / (1 + np.exp(-logits)) if shape.scores == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
    ranked = scores + bias
    size = EXPERTS // shape.groups
    best = [sum(sorted(ranked[g * size : (g + 1) * size])[-shape.group_best :]) for g in range(shape.groups)]
    groups = sorted(range(shape.groups), key=lambda g: -best[g])[: shape.chosen_groups]
    allowed = [e for e in range(EXPERTS) if e // size in groups]
    chosen = sorted(allowed, key=lambda e: -ranked[e])[: shape.chosen]
    weights = np.array([scores[e] for e in chosen])
    if shape.renormalize:
        weights = weights / max(weights.sum() + shape.epsilon, shape.least_sum)
    return chosen, weights * shape.scale


def drawn(shape):
    rng = np.random.default_rng(0)
    return 2 * rng.normal(size=(50, EXPERTS)), 0.5 * rng.normal(size=EXPERTS) * shape.choice_bias


@pytest.mark.parametrize("name", SHAPES)
def test_choices_and_weights_follow_the_rule(name):
    shape = SHAPES[name]
    logits, bias = drawn(shape)
    routes = route(jnp.asarray(logits, jnp.float32), shape, jnp.asarray(bias) if shape.choice_bias else None)
    for token, (chosen, weights) in enumerate(stated(row, shape, bias) for row in logits):
        np.testing.assert_array_equal(routes.experts_MK[token], chosen)
        np.testing.assert_allclose(routes.weights_MK[token], weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["softmax_biased", "sigmoid_grouped"])
def test_the_bias_and_the_groups_decide_the_choice(name):
    shape = SHAPES[name]
    logits, bias = drawn(shape)
    plain = RouterShape(chosen=shape.chosen, renormalize=True, scores=shape.scores)
    logits = jnp.asarray(logits, jnp.float32)
    assert not np.array_equal(route(logits, shape, jnp.asarray(bias)).experts_MK, route(logits, plain).experts_MK)


@pytest.mark.parametrize("name", ["softmax_biased", "sigmoid_grouped"])
def test_gradients_pass_the_weights_and_not_the_bias(name):
    shape = SHAPES[name]
    logits, bias = (jnp.asarray(x, jnp.float32) for x in drawn(shape))
    aim = jnp.asarray(np.random.default_rng(1).normal(size=(50, shape.chosen)), jnp.float32)
    of_logits, of_bias = jax.grad(lambda x, b: jnp.vdot(route(x, shape, b).weights_MK, aim), (0, 1))(logits, bias)
    assert np.abs(of_logits).max() > 1e-2
    assert not np.any(of_bias)
    step = 1e-3 * np.sign(np.asarray(of_logits))
    rise = (jnp.vdot(route(logits + s * step, shape, bias).weights_MK, aim) for s in (0.5, -0.5))
    assert float(next(rise) - next(rise)) == pytest.approx(float(np.abs(of_logits).sum()) * 1e-3, rel=2e-2)
