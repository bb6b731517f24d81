"""Dropout of adapters' inputs: its share, its independence, its gradient, and one draw for layers of one input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft import models
from jaxft.adapters.attach import attach
from jaxft.adapters.dropout import dropout, dropped_levels
from jaxft.adapters.lora import LoRASettings, lora_factory

RATE, LEVELS = 0.05, 13  # 13/256
SHAPE = (4, 126, 64)  # positions that are no whole quarters


def masked(x, key):
    return dropout(x, RATE, key)


@pytest.fixture(scope="module")
def draws():
    """Whether each number is kept, for two keys."""
    return np.asarray(jax.jit(jax.vmap(masked, (None, 0)))(jnp.ones(SHAPE), jax.random.split(jax.random.key(7)))) > 0


def test_the_rate_is_rounded_to_a_256th_but_never_to_none_or_all():
    assert [dropped_levels(rate) for rate in (0.0, 1e-4, RATE, 0.1, 0.5, 0.999)] == [0, 1, LEVELS, 26, 128, 255]


def test_the_share_is_the_rounded_rate_and_draws_are_independent(draws):
    share, count = 1 - LEVELS / 256, draws[0].size
    for kept in draws:
        assert abs(kept.mean() - share) < 5 * math.sqrt(share * (1 - share) / count)
    # Of another key, the next position, the next input, and the positions that are bytes of one word.
    kept, quarter = draws[0], -(-SHAPE[1] // 4)
    pairs = [(kept, draws[1]), (kept[:, 1:], kept[:, :-1]), (kept[..., 1:], kept[..., :-1])]
    pairs += [(kept[:, gap:], kept[:, :-gap]) for gap in (quarter, 2 * quarter, 3 * quarter)]
    for one, other in pairs:
        both = np.mean(~one & ~other)
        expected = (1 - share) ** 2
        assert abs(both - expected) < 5 * math.sqrt(expected / one.size)


def test_values_and_gradients_are_scaled_so_that_the_mean_stays(draws):
    x = jax.random.normal(jax.random.key(1), SHAPE)
    y, pull = jax.vjp(lambda x: masked(x, jax.random.split(jax.random.key(7))[0]), x)
    factor = np.where(draws[0], 256 / (256 - LEVELS), 0)
    np.testing.assert_allclose(y, x * factor, rtol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones(SHAPE))[0], factor, rtol=1e-6)
    assert masked(x, None) is x


def test_eight_devices_draw_what_one_draws(draws):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "context", "tensor"))
    x = jax.device_put(jnp.ones(SHAPE), NamedSharding(mesh, P("data", "context", "tensor")))
    kept = jax.jit(masked)(x, jax.random.split(jax.random.key(7))[0]) > 0
    np.testing.assert_array_equal(kept, draws[0])


def words_drawn(jaxpr):
    """The sizes of all draws of a program."""
    found = [math.prod(eqn.outvars[0].aval.shape) for eqn in jaxpr.eqns if eqn.primitive.name == "random_bits"]
    return found + [n for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params) for n in words_drawn(inner)]


def test_layers_of_one_input_share_a_draw_of_a_quarter_as_many_words(smoke_config):
    module = models.random_model(models.config_from_hf(smoke_config), seed=0)
    attach(module, ("all-linear",), lora_factory(LoRASettings(r=2, alpha=2.0, dropout=0.1)), jax.random.key(0))
    tokens = jnp.zeros((2, 12), jnp.int32)
    program = jax.make_jaxpr(lambda key: module(tokens, key=key)[0])(jax.random.key(0)).jaxpr
    heads = smoke_config["num_attention_heads"] * module.config.head_dim
    widths = (smoke_config["hidden_size"], heads, smoke_config["hidden_size"], smoke_config["intermediate_size"])
    # In the order of a layer: the inputs of q, k and v; of o; of gate and up; of down.
    assert words_drawn(program) == [2 * 12 // 4 * width for width in widths]
