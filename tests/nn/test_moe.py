"""The layer of experts against its definition, token by token and expert by expert."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.nn.experts import layer as module
from jaxft.nn.experts import megablox
from jaxft.nn.experts.layer import MoE, MoEShape
from jaxft.nn.experts.router import RouterShape, route
from jaxft.nn.experts.router_sums import RouterSums
from jaxft.nn.linear import Linear
from jaxft.nn.mlp import ClampedSwiGLU, MLPShape

SHAPE = MoEShape(width=8, hidden=12, experts=5, router=RouterShape(chosen=2, renormalize=True))


def layer(shape=SHAPE):
    return MoE(shape, stddev=0.5, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(params=3))


def kernels(moe):
    modules = (moe.router, moe.gate_proj, moe.up_proj, moe.down_proj)
    return [module.kernel.get_value() for module in modules]


def every_expert(kernels, x_BSD, shape):
    """All experts on all tokens; those that a token did not choose count zero."""
    router, gate, up, down = kernels
    probabilities = jax.nn.softmax(x_BSD @ router, axis=-1)
    least = jnp.sort(probabilities, axis=-1)[..., -shape.router.chosen, None]
    weights = jnp.where(probabilities >= least, probabilities, 0)
    if shape.router.renormalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    inner = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x_BSD, gate)) * jnp.einsum("bsd,edf->bsef", x_BSD, up)
    return jnp.einsum("bsef,efd,bse->bsd", inner, down, weights)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("chosen", [1, 2, 5])
def test_values_and_gradients_are_those_of_all_experts_weighted(chosen, renormalize):
    shape = MoEShape(width=8, hidden=12, experts=5, router=RouterShape(chosen=chosen, renormalize=renormalize))
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
    top, chosen = jax.lax.top_k(logits, shape.router.chosen)
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
    shape = dataclasses.replace(
        SHAPE,
        activation=clamped,
        fused="alternating",
        use_bias=True,
        router=RouterShape(chosen=2, renormalize=True, use_bias=True),
    )
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
    shape = MoEShape(width=8, hidden=12, experts=4, router=RouterShape(chosen=2, renormalize=renormalize))
    routes = route(jnp.log(jnp.array([[0.1, 0.2, 0.6, 0.1]])), shape.router)
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


@pytest.mark.slow
def test_experts_of_a_stack_that_is_read_in_place(monkeypatch):
    fields = {
        "model_type": "qwen3_moe", "hidden_size": 8, "moe_intermediate_size": 12, "num_experts": 4, "head_dim": 4,
        "num_experts_per_tok": 2, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": 32, "intermediate_size": 16,
    }  # fmt: skip
    model = models.random_model(models.config_from_hf(fields), seed=0, dtype="float32", param_dtype="float32")
    graphdef, state = nnx.split(model)
    tokens_BS = jax.random.randint(jax.random.key(0), (1, 7), 0, 32)

    def loss_and_gradients():
        def loss(state):
            return (nnx.merge(graphdef, state)(tokens_BS)[0] ** 2).sum()

        return jax.jit(jax.value_and_grad(loss))(state)

    plain, read, rows_product = loss_and_gradients(), [], megablox._rows_product

    def spy(x, kernel, *rest, **options):
        read.append(kernel.kernels.shape)
        return rows_product(x, kernel, *rest, **options)

    monkeypatch.setattr(module, "reads_stacks", lambda: True)
    monkeypatch.setattr(megablox, "_rows_product", spy)
    in_place = loss_and_gradients()
    assert set(read) == {(3, 4, 8, 12), (3, 4, 12, 8)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, in_place)


def test_experts_without_a_gate():
    shape = dataclasses.replace(SHAPE, gated=False, activation="relu2")
    moe = layer(shape)
    x_BSD = jax.random.normal(jax.random.key(0), (2, 7, 8))
    router, up, down = (module.kernel.get_value() for module in (moe.router, moe.up_proj, moe.down_proj))
    routes = route(x_BSD.reshape(-1, 8) @ router, shape.router)
    inner = jnp.maximum(jnp.einsum("bsd,edf->bsef", x_BSD, up), 0) ** 2
    each = jnp.einsum("bsef,efd->bsed", inner, down).reshape(14, 5, 8)
    expected = sum(
        routes.weights_MK[:, k, None] * each[jnp.arange(14), routes.experts_MK[:, k]] for k in range(2)
    ).reshape(x_BSD.shape)
    np.testing.assert_allclose(moe(x_BSD), expected, rtol=0, atol=1e-5)
    assert not hasattr(moe, "gate_proj")


def test_gate_and_up_in_one_kernel_as_halves():
    plain, fused = layer(), layer(dataclasses.replace(SHAPE, fused="halves"))
    both = jnp.concatenate([plain.gate_proj.kernel.get_value(), plain.up_proj.kernel.get_value()], axis=-1)
    fused.gate_up_proj.kernel.set_value(both)
    for name in ("router", "down_proj"):
        getattr(fused, name).kernel.set_value(getattr(plain, name).kernel.get_value())
    x_BSD = jax.random.normal(jax.random.key(0), (2, 7, 8))
    np.testing.assert_allclose(fused(x_BSD), plain(x_BSD), rtol=0, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_the_shared_expert_is_added_for_every_token(gated):
    shape = dataclasses.replace(SHAPE, shared=MLPShape(width=8, hidden=6), shared_gate=gated)
    moe, x_BSD = layer(shape), jax.random.normal(jax.random.key(0), (2, 7, 8))
    shared = moe.shared_expert(x_BSD, None)
    if gated:
        shared = shared / (1 + jnp.exp(-(x_BSD @ moe.shared_expert_gate.kernel.get_value())))
    expected = every_expert(kernels(moe), x_BSD, shape) + shared
    assert np.abs(shared).max() > 0.1
    np.testing.assert_allclose(moe(x_BSD), expected, rtol=0, atol=1e-5)
    y_BSD, sums = moe.with_router_sums(x_BSD, jnp.ones((2, 7), jnp.int32), RouterSums.zero(5))
    np.testing.assert_allclose(y_BSD, expected, rtol=0, atol=1e-5)
    assert float(sums.tokens) == 14
    assert float(sums.chosen_E.sum()) == 28
    linears = {path[-2:] for path, module in nnx.iter_modules(moe) if isinstance(module, Linear)}
    assert linears == {("shared_expert", name) for name in ("gate_proj", "up_proj", "down_proj")}


def test_a_router_that_normalises_another_input_and_scales_each_expert():
    router = RouterShape(chosen=2, renormalize=True, norm_eps=1e-6, expert_scale=True)
    moe = layer(dataclasses.replace(SHAPE, router=router))
    rng = np.random.default_rng(0)
    scale, factors = (rng.normal(1, 0.2, size).astype(np.float32) for size in (SHAPE.width, SHAPE.experts))
    moe.router.scale.set_value(jnp.asarray(scale))
    moe.router.per_expert_scale.set_value(jnp.asarray(factors))
    x_BSD, seen_BSD = rng.normal(size=(2, 1, 3, SHAPE.width)).astype(np.float32)
    unit_MD = seen_BSD[0] / np.sqrt(np.mean(seen_BSD[0] ** 2, axis=-1, keepdims=True) + 1e-6)
    logits_ME = (unit_MD * scale / np.sqrt(SHAPE.width)) @ np.asarray(moe.router.kernel.get_value())
    np.testing.assert_allclose(moe.router(seen_BSD[0]), logits_ME, rtol=0, atol=1e-5)
    plain = route(jnp.asarray(logits_ME), router)
    weights_MK = np.asarray(plain.weights_MK) * factors[np.asarray(plain.experts_MK)]
    np.testing.assert_allclose(moe.router.route(jnp.asarray(logits_ME)).weights_MK, weights_MK, rtol=1e-6)
    expected = moe._combine(x_BSD[0], jnp.asarray(weights_MK), plain.experts_MK)
    np.testing.assert_allclose(moe(x_BSD, seen_BSD=seen_BSD)[0], expected, rtol=0, atol=1e-5)
