"""A value head in `Decoder.value`: part of the model's state, outside its forward pass."""

# B batch, S sequence, D model

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.training.state import divide
from jaxft.trees import flatten

TOKENS_BS = np.random.default_rng(0).integers(0, 96, (2, 12))


class Head(nnx.Module):
    def __init__(self, width):
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (width,)))

    def __call__(self, hidden_BSD):
        return hidden_BSD.astype(jnp.float32) @ self.kernel.get_value()


@pytest.fixture
def config(smoke_config):
    return models.config_from_hf(smoke_config)


def test_a_value_head_changes_neither_hidden_vectors_nor_logits(config):
    model = models.random_model(config, seed=0)
    hidden_BSD, _ = model(TOKENS_BS)
    before = set(flatten(nnx.state(model, nnx.Param))[0])
    model.value = Head(config.hidden_size)
    again_BSD, _ = model(TOKENS_BS)
    assert np.array_equal(hidden_BSD, again_BSD)
    assert np.array_equal(model.unembed(hidden_BSD), model.unembed(again_BSD))
    assert set(flatten(nnx.state(model, nnx.Param))[0]) - before == {"value/kernel"}
    assert model.value(hidden_BSD).shape == TOKENS_BS.shape


def test_a_value_head_splits_and_merges_with_its_model(config):
    model = models.random_model(config, seed=0)
    model.value = Head(config.hidden_size)
    graphdef, trainable, frozen = divide(model)
    assert "value/kernel" in flatten(trainable)[0] and not jax.tree.leaves(frozen)

    @jax.jit
    def values(trainable, frozen):
        model = nnx.merge(graphdef, trainable, frozen)
        hidden_BSD, _ = model(TOKENS_BS)
        return model.value(hidden_BSD)

    hidden_BSD, _ = model(TOKENS_BS)
    np.testing.assert_allclose(values(trainable, frozen), model.value(hidden_BSD), rtol=1e-5, atol=1e-5)


def test_the_slot_is_empty_at_first(config):
    assert models.abstract_model(config).value is None
