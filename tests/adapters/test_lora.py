"""LoRA: a fresh one changes nothing, merging changes nothing, and the scale, dropout and draw are as published."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from jaxft import models
from jaxft.adapters.attach import AdapterParam, adapters, attach, merge
from jaxft.adapters.lora import LoRA, LoRASettings, lora_factory, make_lora
from jaxft.nn.linear import Linear, apply_layers
from jaxft.trees import flatten

TOKENS = np.random.default_rng(0).integers(0, 259, (2, 12))


def logits_of(module, key=None):
    return np.asarray(jax.jit(lambda: module.unembed(module(jnp.asarray(TOKENS), key=key)[0]))())


def with_lora(smoke_config, *, targets=("all-linear",), param_dtype="float32", untrained=False, **settings):
    """The smoke model with adapters; as if trained, unless told."""
    config = models.config_from_hf(smoke_config)
    module = models.random_model(config, seed=0, param_dtype=param_dtype)
    settings = LoRASettings(**{"r": 4, "alpha": 8.0} | settings)
    attach(module, targets, lora_factory(settings), jax.random.key(1))
    for index, adapter in enumerate(adapters(module).values()):
        if not untrained:
            key = jax.random.key(index)
            adapter.lora_b.set_value(0.1 * jax.random.normal(key, adapter.lora_b.get_value().shape))
    return module


def test_a_fresh_adapter_changes_no_bit(smoke_config):
    base = models.random_model(models.config_from_hf(smoke_config), seed=0)
    np.testing.assert_array_equal(logits_of(with_lora(smoke_config, untrained=True)), logits_of(base))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_merged_equals_unmerged(smoke_config, use_rslora):
    module = with_lora(smoke_config, use_rslora=use_rslora)
    apart = logits_of(module)
    assert np.abs(apart - logits_of(models.random_model(module.config, seed=0))).max() > 0.05
    merge(module)
    assert not adapters(module)
    assert not jax.tree.leaves(nnx.state(module, AdapterParam))
    np.testing.assert_allclose(logits_of(module), apart, rtol=0, atol=1e-5)


def test_merging_into_bfloat16_adds_in_float32_and_rounds_once(smoke_config):
    module = with_lora(smoke_config, param_dtype="bfloat16")
    path, adapter = next(iter(adapters(module).items()))
    kernel = flatten(nnx.state(module))[0][f"{path}/kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(module, AdapterParam)))
    expected = (kernel.astype(jnp.float32) + adapter.delta()).astype(jnp.bfloat16)
    merge(module)
    np.testing.assert_array_equal(flatten(nnx.state(module))[0][f"{path}/kernel"], expected)


def test_scale_is_alpha_over_r_or_over_its_root():
    assert LoRASettings(r=16, alpha=32.0).scale == 2.0
    assert LoRASettings(r=16, alpha=32.0, use_rslora=True).scale == 8.0


def test_output_and_gradients_are_those_of_the_formula():
    settings = LoRASettings(r=3, alpha=6.0)
    adapter = LoRA(8, 5, settings, key=jax.random.key(0))
    adapter.lora_b.set_value(jax.random.normal(jax.random.key(1), adapter.lora_b.get_value().shape))
    graphdef, state = nnx.split(adapter)
    x, y = jax.random.normal(jax.random.key(2), (2, 4, 8)), jnp.ones((2, 4, 5))

    def loss(state, x, by_delta):
        adapter = nnx.merge(graphdef, state)
        out = y + x @ adapter.delta() if by_delta else adapter(x, y, None, None)
        return jnp.sum(jnp.sin(out))

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), run(state, x, False), run(state, x, True)
    )


def narrow_sums(jaxpr, inputs):
    """The widths of the results of all products that sum over so many inputs and give fewer numbers than these."""
    found = []
    for eqn in jaxpr.eqns:
        for inner in jaxprs_in_params(eqn.params):
            found += narrow_sums(inner, inputs)
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            width = eqn.outvars[0].aval.shape[-1]
            found += [width] if summed == inputs and width < 16 else []
    return found


def unlike_layers():
    """Layers of one input of 24, of which one has no adapter and the others have unlike ranks and scales."""
    layers = []
    for seed, (outputs, rank) in enumerate(((20, 3), (30, None), (40, 2), (17, 5))):
        types = {"dtype": jnp.float32, "param_dtype": jnp.float32}
        layer = Linear(24, outputs, use_bias=seed == 0, rngs=nnx.Rngs(params=jax.random.key(seed)), **types)
        if rank is not None:
            settings = LoRASettings(r=rank, alpha=6.0, use_bias=seed == 2, init="olora" if seed == 3 else "default")
            layer.adapter = make_lora(layer, (settings,), jax.random.key(seed))
            moved = layer.adapter.lora_b.get_value()
            layer.adapter.lora_b.set_value(moved + jax.random.normal(jax.random.key(seed), moved.shape))
        layers.append(layer)
    return layers


def test_layers_of_one_input_have_one_narrow_product_and_the_same_numbers():
    graphdef, state = nnx.split(nnx.List(unlike_layers()))
    trained, frozen = nnx.split_state(state, AdapterParam, ...)
    x = jax.random.normal(jax.random.key(9), (2, 6, 24))

    def outputs(trained, x, apart):
        layers = list(nnx.merge(graphdef, trained, frozen))
        return tuple(layer(x) for layer in layers) if apart else apply_layers(layers, x, [None] * len(layers))

    def gradients(trained, x, apart):
        ys, pull = jax.vjp(functools.partial(outputs, apart=apart), trained, x)
        return ys, pull(tuple(map(jnp.cos, ys)))

    found, expected = (jax.jit(gradients, static_argnums=2)(trained, x, apart) for apart in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    # The layer that subtracts its initial values has twice its rank.
    one, several = (jax.make_jaxpr(outputs, static_argnums=2)(trained, x, apart) for apart in (False, True))
    assert (narrow_sums(one.jaxpr, 24), narrow_sums(several.jaxpr, 24)) == ([15], [3, 2, 10])


def test_attention_and_feed_forward_have_one_narrow_product_for_each_input(smoke_config):
    module = with_lora(smoke_config, r=2, alpha=2.0)
    program = jax.make_jaxpr(lambda tokens: module(tokens)[0])(jnp.asarray(TOKENS)).jaxpr
    width, inner = smoke_config["hidden_size"], smoke_config["intermediate_size"]
    heads = smoke_config["num_attention_heads"] * module.config.head_dim
    widths = sorted(w for size in {width, inner, heads} for w in narrow_sums(program, size))
    assert widths == [2, 2, 4, 6]  # those of o and of down, of gate and up, of q, k and v


def test_dropout_acts_only_with_a_key_and_is_unbiased():
    settings = LoRASettings(r=4, alpha=4.0, dropout=0.25)
    adapter = LoRA(16, 6, settings, key=jax.random.key(0))
    adapter.lora_b.set_value(jax.random.normal(jax.random.key(1), adapter.lora_b.get_value().shape))
    x, y = jax.random.normal(jax.random.key(2), (16,)), jnp.zeros(6)
    still = adapter(x, y, None, None)
    np.testing.assert_allclose(still, x @ adapter.delta(), rtol=0, atol=1e-5)
    draws = jax.jit(jax.vmap(lambda key: adapter(x, y, None, key)))(jax.random.split(jax.random.key(3), 8192))
    assert np.unique(np.asarray(draws[:, 0])).size > 1000
    # Within five standard errors of the mean.
    error = 5 * np.asarray(draws).std(axis=0) / math.sqrt(len(draws))
    assert (np.abs(np.asarray(draws).mean(axis=0) - still) < error).all()


def test_dropout_in_a_model_differs_by_key_and_leaves_the_base_alone(smoke_config):
    module = with_lora(smoke_config, dropout=0.5)
    one, again, other = (logits_of(module, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3
    without = with_lora(smoke_config, dropout=0.0)
    np.testing.assert_array_equal(logits_of(without, jax.random.key(0)), logits_of(without))


def test_a_is_kaiming_uniform_and_b_is_zero():
    inputs = 200
    adapter = LoRA(inputs, 50, LoRASettings(r=32, alpha=1.0), stack=(6,), key=jax.random.key(0))
    a = np.asarray(adapter.lora_a.get_value())
    assert not adapter.lora_b.get_value().any()
    assert adapter.delta().shape == (6, inputs, 50)
    assert np.abs(a).max() <= 1 / math.sqrt(inputs)
    # 38,400 uniform draws: the variance is within 5 standard errors, about 2 %, of 1 / (3 I).
    assert a.var() == pytest.approx(1 / (3 * inputs), rel=0.025)
    assert abs(a.mean()) < 5 * a.std() / math.sqrt(a.size)
    assert len(np.unique(a)) > 0.99 * a.size
