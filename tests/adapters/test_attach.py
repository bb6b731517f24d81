"""Which layers get an adapter, and what is said when none does."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.adapters.attach import AdapterParam, adapters, attach, linears, merge
from jaxft.adapters.lora import LoRASettings, lora_factory
from jaxft.errors import ModelError
from jaxft.trees import flatten

SETTINGS = LoRASettings(r=2, alpha=4.0)
ATTENTION = {f"layers/0/self_attn/{name}_proj" for name in "qkvo"}
MLP = {f"layers/0/mlp/{name}_proj" for name in ("gate", "up", "down")}


make = lora_factory(SETTINGS)


@pytest.fixture
def module(smoke_config):
    return models.random_model(models.config_from_hf(smoke_config | {"tie_word_embeddings": False}), seed=0)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["all-linear"], ATTENTION | MLP),
        (["q_proj", "v_proj"], {"layers/0/self_attn/q_proj", "layers/0/self_attn/v_proj"}),
        (["self_attn/o_proj"], {"layers/0/self_attn/o_proj"}),
        (["layers/0/mlp/up_proj"], {"layers/0/mlp/up_proj"}),
        (["lm_head"], {"lm_head"}),
        (["all-linear", "lm_head", "q_proj"], ATTENTION | MLP | {"lm_head"}),
    ],
)
def test_targets_are_found_by_the_end_of_their_path(module, targets, expected):
    assert attach(module, targets, make, jax.random.key(0)) == tuple(sorted(expected))
    assert set(adapters(module)) == expected


def test_base_parameters_keep_their_paths_and_values(module):
    before = flatten(nnx.state(module))[0]
    attach(module, ["all-linear"], make, jax.random.key(0))
    after = flatten(nnx.state(module))[0]
    assert set(before) <= set(after)
    assert all(np.array_equal(before[path], after[path]) for path in before)
    assert len(jax.tree.leaves(nnx.state(module, AdapterParam))) == 2 * 7


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_porj", r"'q_porj' matches no layer. Did you mean 'q_proj'\? This model has .*lm_head.*all-linear"),
        ("proj", "'proj' matches no layer"),
        ("mlp/q_proj", "'mlp/q_proj' matches no layer"),
        ("embed_tokens", "'embed_tokens' matches no layer"),
    ],
)
def test_a_target_that_matches_nothing_is_refused(module, target, message):
    with pytest.raises(ModelError, match=message):
        attach(module, ["v_proj", target], make, jax.random.key(0))
    assert not adapters(module)


def test_the_draw_depends_on_the_path_and_not_on_the_company(module, smoke_config):
    attach(module, ["q_proj"], make, jax.random.key(0))
    other = models.random_model(models.config_from_hf(smoke_config), seed=0)
    attach(other, ["all-linear"], make, jax.random.key(0))
    drawn = {path: np.asarray(adapter.lora_a.get_value()) for path, adapter in adapters(other).items()}
    path = "layers/0/self_attn/q_proj"
    np.testing.assert_array_equal(adapters(module)[path].lora_a.get_value(), drawn[path])
    assert not np.array_equal(drawn[path], drawn["layers/0/self_attn/o_proj"])
    assert not np.array_equal(drawn[path][0], drawn[path][1])


def test_merging_a_model_without_adapters_changes_nothing(module):
    before = flatten(nnx.state(module))[0]
    merge(module)
    assert all(np.array_equal(before[path], leaf) for path, leaf in flatten(nnx.state(module))[0].items())


def test_linears_are_all_listed_once(module):
    assert [path for path, _ in linears(module)] == sorted(ATTENTION | MLP | {"lm_head"})
