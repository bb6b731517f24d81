"""Forms of LoRA: fresh ones change nothing, merged equals unmerged, and which layers and ranks a config gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.adapters.attach import AdapterParam, SavedParam, StartParam, adapters, merge, slots
from jaxft.adapters.dropout import dropout
from jaxft.adapters.make import attach_adapter
from jaxft.config import AdapterConfig
from jaxft.errors import ModelError
from jaxft.training.state import create, divide, saved_part, with_saved
from jaxft.trees import flatten

TOKENS = np.random.default_rng(0).integers(0, 250, (2, 12))
FORMS = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa by iteration, dora": {"init_lora_weights": "pissa_niter_3", "use_dora": True},
    "unlike layers": {
        "layers_to_transform": "0", "rank_pattern": "q_proj:8,down_proj:2", "use_dora": True,
        "alpha_pattern": "layers.0.mlp.up_proj:3",
    },
    "unlike ranks, olora": {"rank_pattern": "layers.1.self_attn.q_proj:2", "init_lora_weights": "olora"},
    "head, embeddings, norm": {"target_modules": "q_proj,lm_head,embed_tokens", "modules_to_save": "norm"},
}  # fmt: skip


def logits_of(module, key=None):
    graphdef, state = nnx.split(module)

    def run(state):
        module = nnx.merge(graphdef, state)
        return module.unembed(module(jnp.asarray(TOKENS), key=key)[0])

    return np.asarray(jax.jit(run)(state))


@pytest.fixture
def base(smoke_config):
    return models.random_model(models.config_from_hf(smoke_config | {"tie_word_embeddings": False}), seed=0)


def moved(module):
    """The module as if trained."""
    state = nnx.state(module, AdapterParam)
    nnx.update(module, jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(1), x.shape), state))
    return module


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_one_equals_the_base_and_a_merged_one_itself(base, form):
    before = logits_of(base)
    attach_adapter(base, AdapterConfig(r=4, **FORMS[form]), 0)
    np.testing.assert_allclose(logits_of(base), before, rtol=0, atol=1e-6)
    apart = logits_of(moved(base))
    assert np.abs(apart - before).max() > 0.05
    plain = nnx.merge(*nnx.split(base))
    for _, layer in slots(plain):
        if layer.adapter is not None:
            layer.adapter = layer.adapter.plain()
    np.testing.assert_allclose(logits_of(plain), apart, rtol=0, atol=1e-6)
    merge(base)
    assert not adapters(base)
    np.testing.assert_allclose(logits_of(base), apart, rtol=0, atol=1e-5)


def test_dora_sends_dropped_inputs_through_the_base_once_more(base):
    attach_adapter(base, AdapterConfig(r=2, use_dora=True, dropout=0.5, target_modules="q_proj"), 0)
    layer = nnx.merge(*nnx.split(base)).layers[0].self_attn.q_proj
    graphdef, state = nnx.split(layer)
    layer = nnx.merge(graphdef, jax.tree.map(lambda x: x[0] + 0.1, state))
    adapter, kernel = layer.adapter, layer.kernel.get_value()
    x, key = jax.random.normal(jax.random.key(0), (3, kernel.shape[0])), jax.random.key(1)
    dropped = dropout(x, 0.5, key)
    moved_kernel = kernel + adapter.delta()
    gain = adapter.lora_magnitude.get_value() / jnp.linalg.norm(moved_kernel, axis=0)
    expected = x @ kernel + (gain - 1) * (dropped @ kernel) + gain * (dropped @ adapter.delta())
    np.testing.assert_allclose(layer(x, key), expected, rtol=0, atol=1e-4)


def test_layers_left_out_never_move(base):
    config = AdapterConfig(r=4, use_dora=True, layers_to_transform="1", rank_pattern="q_proj:2")
    attach_adapter(base, config, 0)
    graphdef, trainable, frozen = divide(base)

    def total(trainable):
        module = nnx.merge(graphdef, trainable, frozen)
        return (module.unembed(module(jnp.asarray(TOKENS))[0]) ** 2).sum()

    trainable = jax.tree.map(lambda x: x, trainable)
    for path, grad in flatten(jax.jit(jax.grad(total))(trainable))[0].items():
        assert not np.asarray(grad)[0].any(), path
        assert np.asarray(grad)[1].any() or path.endswith("lora_a"), path


def test_what_is_trained_whole_is_float32_and_moves(smoke_config):
    config = models.config_from_hf(smoke_config)
    module = models.random_model(config, seed=0, param_dtype="bfloat16")
    attach_adapter(module, AdapterConfig(r=2, modules_to_save="embed_tokens,input_layernorm"), 0)
    saved = flatten(nnx.state(module, SavedParam))[0]
    assert set(saved) == {"embed_tokens/embedding", "layers/0/input_layernorm/scale"}
    assert all(leaf.dtype == jnp.float32 for leaf in saved.values())
    assert set(saved) < set(flatten(divide(module)[1])[0])


def test_a_checkpoint_holds_what_adapters_are_counted_from(base):
    import optax

    attach_adapter(base, AdapterConfig(r=2, init_lora_weights="pissa"), 0)
    _, state = create(base, optax.sgd(0.1), 0)
    held = saved_part(state)
    assert len(jax.tree.leaves(held["start"])) == 14
    other = state._replace(frozen=jax.tree.map(jnp.zeros_like, state.frozen), step=jnp.int32(7))
    back = with_saved(other, held)
    assert back.step == 0
    for path, leaf in flatten(nnx.filter_state(back.frozen, StartParam))[0].items():
        assert np.asarray(leaf).any(), path
    assert not np.asarray(flatten(back.frozen)[0]["embed_tokens/embedding"]).any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers_to_transform": "1-9"}, r"names layer 2; the model has 0 to 1"),
        ({"rank_pattern": "qproj:8"}, r"'qproj' fits no module that gets an adapter: down_proj"),
        ({"exclude_modules": "q_porj"}, r"'q_porj' matches no layer. Did you mean 'q_proj'"),
        ({"modules_to_save": "nrom"}, r"'nrom' matches no module. Did you mean 'norm'"),
        ({"modules_to_save": "q_proj"}, r"q_proj has an adapter and is in modules_to_save"),
        ({"target_modules": "embed_tokens", "use_dora": True}, "use_dora is not for embed_tokens"),
        ({"target_modules": "embed_tokens", "init_lora_weights": "pissa"}, "'pissa' is for matrices"),
        ({"rank_pattern": "q_proj:640"}, "adapter.r=640 exceeds a layer"),
    ],
)
def test_what_a_model_does_not_have_is_refused(base, config, message):
    with pytest.raises(ModelError, match=message):
        attach_adapter(base, AdapterConfig(r=2, **config), 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": "embed_tokens"}, "embed_tokens, which is the LM head too"),
        ({"target_modules": "lm_head"}, r"matches no layer. Its LM head is embed_tokens \(tie_word_embeddings\)"),
        ({"modules_to_save": "lm_head"}, r"'lm_head' matches no module. The LM head is embed_tokens"),
    ],
)
def test_a_head_that_is_the_table_has_no_adapter_of_its_own(smoke_config, config, message):
    module = models.random_model(models.config_from_hf(smoke_config), seed=0)
    with pytest.raises(ModelError, match=message):
        attach_adapter(module, AdapterConfig(r=2, **config), 0)
