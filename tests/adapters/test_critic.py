"""A critic: it starts at 0, shares the base's arrays and nothing else with the policy, and leaves the policy alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.adapters.attach import adapters
from jaxft.adapters.critic import attach_critic, critic_values, drop_critic, without_critic
from jaxft.adapters.make import attach_adapter
from jaxft.config import AdapterConfig
from jaxft.data.batch import Batch
from jaxft.errors import ModelError
from jaxft.nn.param_kind import kind_of
from jaxft.nn.stack import group_layers
from jaxft.optim.rates import scale_by_parameter
from jaxft.training.state import divide
from jaxft.trees import flatten

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 259, (2, 12)), jnp.int32)
POSITIONS, SEGMENTS = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12)), jnp.ones((2, 12), jnp.int32)
KINDS = {
    "lora": AdapterConfig(kind="lora", r=4),
    "dora": AdapterConfig(kind="lora", r=4, use_dora=True),
    "pissa": AdapterConfig(kind="lora", r=4, init_lora_weights="pissa"),
    "vera": AdapterConfig(kind="vera", r=4),
    "ia3": AdapterConfig(kind="ia3"),
}


def values_of(model):
    return critic_values(model, Batch(TOKENS, TOKENS, SEGMENTS.astype(jnp.float32), POSITIONS, SEGMENTS))


@pytest.fixture(scope="module")
def base(smoke_config):
    return models.random_model(models.config_from_hf(smoke_config | {"tie_word_embeddings": False}), seed=0)


def with_critic(base, kind):
    model = nnx.merge(*nnx.split(base))
    attach_adapter(model, KINDS[kind], 0)
    attach_critic(model, KINDS[kind], 0)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_it_shares_the_base_and_nothing_else(base, kind):
    model = with_critic(base, kind)
    graphdef, trainable, frozen = divide(model)
    own = {path for path in flatten(trainable)[0] if path.startswith("value/")}
    others = flatten(trainable)[0].keys() - own
    assert {path.removeprefix("value/") for path in own} == others | {"head/weight"}
    assert not any(path.startswith("value/") for path in flatten(frozen)[0])

    @jax.jit
    def both(trainable):
        model = nnx.merge(graphdef, trainable, frozen)
        return model(TOKENS)[0], values_of(model)

    hidden, values = both(trainable)
    np.testing.assert_array_equal(values, 0)
    # With a head, fresh adapters predict what the base's hidden vectors give.
    head = jnp.linspace(-1, 1, model.config.hidden_size)
    flat, treedef = flatten(trainable)
    of_head = jax.tree.unflatten(treedef, [head if path == "value/head/weight" else x for path, x in flat.items()])
    expected = jnp.einsum("BSD,D->BS", base(TOKENS)[0], head, precision="highest")
    np.testing.assert_allclose(both(of_head)[1], expected, rtol=0, atol=2e-5)
    # What one of the two learns does not move the other.
    for chosen in (own, others):
        flat, treedef = flatten(of_head)
        moved = jax.tree.unflatten(treedef, [x + 0.1 if path in chosen else x for path, x in flat.items()])
        new_hidden, new_values = both(moved)
        changed = [bool(np.abs(a - b).max() > 1e-3) for a, b in ((new_hidden, hidden), (new_values, both(of_head)[1]))]
        assert changed == ([False, True] if chosen is own else [True, False])


def test_the_policy_alone_has_its_adapters_and_no_critic(base):
    model = with_critic(base, "lora")
    alone = without_critic(model)
    assert alone.value is None and model.value is not None
    assert adapters(alone).keys() == adapters(model).keys() and without_critic(alone) is alone
    drop_critic(model)
    assert model.value is None and flatten(nnx.state(model))[0].keys() == flatten(nnx.state(alone))[0].keys()
    with pytest.raises(ModelError, match="has no critic"):
        values_of(model)


def test_its_adapters_are_treated_as_those_of_their_layers(base):
    """By optimizers: stacked, a matrix, of an adapter, and at the depth of the layer."""
    model = with_critic(base, "dora")
    trainable = divide(model)[1]
    flat = flatten(trainable)[0]
    critics = {path: x for path, x in flat.items() if path.startswith("value/layers/")}
    assert critics
    for path, x in critics.items():
        assert kind_of(path, x.ndim) == kind_of(path.removeprefix("value/"), x.ndim)
        assert kind_of(path, x.ndim).stacked and kind_of(path, x.ndim).adapter
    stacks = group_layers(model.segments)
    tx = scale_by_parameter(loraplus_lr_ratio=4.0, layer_decay=0.5, stacks=stacks)
    ones = jax.tree.map(jnp.ones_like, trainable)
    factors = flatten(tx.update(ones, tx.init(ones))[0])[0]
    for path in critics:
        np.testing.assert_array_equal(factors[path], factors[path.removeprefix("value/")])
