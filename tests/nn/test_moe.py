"""The layer of experts against its definition, token by token and expert by expert."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.nn.experts.layer import MoE, MoEShape, route
from jaxft.nn.mlp import ClampedSwiGLU

SHAPE = MoEShape(width=8, hidden=12, experts=5, chosen=2, renormalize=True)


def layer(shape=SHAPE):
    return MoE(shape, stddev=0.5, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(params=3))


def kernels(moe):
    modules = (moe.router, moe.gate_proj, moe.up_proj, moe.down_proj)
    return [module.kernel.get_value() for module in modules]


def every_expert(kernels, x_BSD, shape):
    """All experts on all tokens; those that a token did not choose count zero."""
    router, gate, up, down = kernels
    probabilities = jax.nn.softmax(x_BSD @ router, axis=-1)
    least = jnp.sort(probabilities, axis=-1)[..., -shape.chosen, None]
    weights = jnp.where(probabilities >= least, probabilities, 0)
    if shape.renormalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    inner = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x_BSD, gate)) * jnp.einsum("bsd,edf->bsef", x_BSD, up)
    return jnp.einsum("bsef,efd,bse->bsd", inner, down, weights)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("chosen", [1, 2, 5])
def test_values_and_gradients_are_those_of_all_experts_weighted(chosen, renormalize):
    shape = MoEShape(width=8, hidden=12, experts=5, chosen=chosen, renormalize=renormalize)
    moe = layer(shape)
    x_BSD = jax.random.normal(jax.random.key(0), (2, 7, 8))
    aim_BSD = jax.random.normal(jax.random.key(1), x_BSD.shape)
    np.testing.assert_allclose(moe(x_BSD), every_expert(kernels(moe), x_BSD, shape), rtol=0, atol=1e-5)
    graphdef, state = nnx.split(moe)

    def ours(state, x_BSD):
        return jnp.vdot(nnx.merge(graphdef, state)(x_BSD), aim_BSD)

    def theirs(kernels, x_BSD):
        return jnp.vdot(every_expert(kernels, x_BSD, shape), aim_BSD)

    grads, grad_x = jax.grad(ours, (0, 1))(state, x_BSD)
    expected, expected_x = jax.grad(theirs, (0, 1))(kernels(moe), x_BSD)
    np.testing.assert_allclose(grad_x, expected_x, rtol=0, atol=1e-4)
    # The router of one renormalised expert always says one: nothing to learn from.
    assert (np.abs(expected[0]).max() > 1e-2) == (chosen > 1 or not renormalize)
    for grad, wanted in zip(kernels(nnx.merge(graphdef, grads)), expected, strict=True):
        np.testing.assert_allclose(grad, wanted, rtol=0, atol=1e-4)


def by_definition(parameters, x_BSD, shape):
    """Fused experts with biases and a clamped activation: softmax over the chosen logits, experts one by one."""
    names = ("router", "gate_up_proj", "down_proj")
    router, gate_up, down = ((parameters[name]["kernel"], parameters[name]["bias"]) for name in names)
    logits = x_BSD @ router[0] + router[1]
    top, chosen = jax.lax.top_k(logits, shape.chosen)
    weights = jax.nn.softmax(top, axis=-1)
    out = jnp.zeros_like(x_BSD)
    for e in range(shape.experts):
        both = x_BSD @ gate_up[0][e] + gate_up[1][e]
        gate, up = both[..., ::2], both[..., 1::2]
        gate = jnp.where(gate > 1.5, 1.5, gate)
        up = jnp.where(up > 1.5, 1.5, jnp.where(up < -1.5, -1.5, up))
        inner = (up + 1) * gate / (1 + jnp.exp(-1.7 * gate))
        share = jnp.where(chosen == e, weights, 0).sum(axis=-1, keepdims=True)
        out = out + share * (inner @ down[0][e] + down[1][e])
    return out


def test_fused_experts_with_biases_and_a_clamped_activation():
    clamped = ClampedSwiGLU(alpha=1.7, limit=1.5)
    shape = dataclasses.replace(SHAPE, activation=clamped, fused=True, use_bias=True)
    graphdef, state = nnx.split(layer(shape))
    # Biases start at zero.
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    state = treedef.unflatten([0.5 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])
    x_BSD = jax.random.normal(jax.random.key(0), (2, 7, 8))
    aim_BSD = jax.random.normal(jax.random.key(1), x_BSD.shape)

    def ours(state, x_BSD):
        out_BSD = nnx.merge(graphdef, state)(x_BSD)
        return jnp.vdot(out_BSD, aim_BSD), out_BSD

    def theirs(state, x_BSD):
        out_BSD = by_definition(nnx.to_pure_dict(state), x_BSD, shape)
        return jnp.vdot(out_BSD, aim_BSD), out_BSD

    (grads, out), (expected, wanted) = (
        jax.jit(jax.grad(f, (0, 1), has_aux=True))(state, x_BSD) for f in (ours, theirs)
    )
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-5)
    assert all(np.abs(grad).max() > 1e-2 for grad in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), grads, expected)


def test_a_token_counts_for_itself_alone():
    moe = layer()
    x_BSD = jax.random.normal(jax.random.key(0), (2, 7, 8))
    others = x_BSD.at[:, 4:].set(100.0)
    np.testing.assert_allclose(moe(others)[:, :4], moe(x_BSD)[:, :4], rtol=0, atol=1e-6)
    np.testing.assert_allclose(moe(x_BSD[:1, 2:3]), moe(x_BSD)[:1, 2:3], rtol=0, atol=1e-6)


def test_no_token_is_dropped_when_all_choose_the_same_experts():
    moe = layer()
    x_BSD = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (8,)), (2, 7, 8))
    out_BSD = moe(x_BSD)
    assert np.abs(out_BSD).max() > 0.1
    np.testing.assert_allclose(out_BSD, jnp.broadcast_to(out_BSD[0, 0], out_BSD.shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("renormalize", "weights"), [(True, [0.75, 0.25]), (False, [0.6, 0.2])])
def test_routes_by_hand(renormalize, weights):
    shape = MoEShape(width=8, hidden=12, experts=4, chosen=2, renormalize=renormalize)
    routes = route(jnp.log(jnp.array([[0.1, 0.2, 0.6, 0.1]])), shape)
    np.testing.assert_array_equal(routes.experts_MK, [[2, 1]])
    np.testing.assert_allclose(routes.weights_MK, [weights], rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", [jax.checkpoint_policies.save_only_these_names("dots"), None])
def test_recomputation_changes_no_gradient(policy):
    moe = layer()
    graphdef, state = nnx.split(moe)
    x_BSD = jax.random.normal(jax.random.key(0), (2, 7, 8))

    def loss(state, x_BSD):
        return (nnx.merge(graphdef, state)(x_BSD) ** 2).sum()

    plain = jax.jit(jax.grad(loss, (0, 1)))(state, x_BSD)
    again = jax.jit(jax.grad(jax.checkpoint(loss, policy=policy), (0, 1)))(state, x_BSD)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, again)
