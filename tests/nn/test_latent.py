"""Latent attention against DeepSeek's in transformers: over whole rows, packed, and from its cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.adapters.attach import set_adapter
from jaxft.adapters.lora import LoRASettings, make_lora
from jaxft.nn.attention.latent import LatentAttention, LatentShape
from jaxft.nn.attention.layer import Tokens
from jaxft.nn.attention.rope import Rope, rotation
from jaxft.nn.norm import NormShape

SHAPE = LatentShape(
    width=32, heads=4, query_rank=12, rank=16, plain_dim=8, rotated_dim=8, value_dim=12, scale=16**-0.5, use_bias=True
)
ROPE = Rope(theta=100.0)


def make(shape=SHAPE):
    layer = LatentAttention(
        shape, NormShape(eps=1e-5), stddev=0.2, dtype=jnp.dtype("float32"), param_dtype=jnp.dtype("float32"),
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    graphdef, state = nnx.split(layer)
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    wide = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, wide))


def tokens_of(positions, segments):
    positions, segments = jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32)
    return Tokens(positions, segments, (rotation(ROPE, SHAPE.rotated_dim, positions, segments),))


def whole(layer, x):
    positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    return layer(x, tokens_of(positions, np.ones_like(positions)), None, jnp.int32(0), None)[0]


@pytest.mark.parametrize("query_rank", [None, 12])
def test_it_is_that_of_transformers(query_rank):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    import dataclasses

    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    layer = make(dataclasses.replace(SHAPE, query_rank=query_rank))
    config = transformers.AutoConfig.for_model(
        "deepseek_v3", hidden_size=32, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=query_rank,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0}, attn_implementation="eager",
    )  # fmt: skip
    theirs = DeepseekV3Attention(config, 0).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            part, kind = name.rsplit(".", 1)
            module = getattr(layer, part)
            ours = module.bias if kind == "bias" else module.scale if "norm" in part else module.kernel
            parameter.copy_(torch.from_numpy(np.array(ours.get_value()).T))
    x = np.random.default_rng(0).normal(size=(2, 11, 32)).astype(np.float32)
    ids = torch.arange(11)[None]
    mask = torch.full((1, 1, 11, 11), -torch.inf).triu(1)
    with torch.no_grad():
        places = DeepseekV3RotaryEmbedding(config)(torch.from_numpy(x), ids)
        expected = theirs(torch.from_numpy(x), places, mask)[0].numpy()
    np.testing.assert_allclose(whole(layer, jnp.asarray(x)), expected, rtol=0, atol=1e-5)


def test_documents_of_a_row_are_as_if_each_were_alone():
    layer, x = make(), jax.random.normal(jax.random.key(2), (1, 14, 32))
    segments = np.repeat([1, 2, 3], (5, 6, 3))[None]
    positions = np.concatenate([np.arange(n) for n in (5, 6, 3)])[None]
    packed = layer(x, tokens_of(positions, segments), None, jnp.int32(0), None)[0]
    for start, stop in ((0, 5), (5, 11), (11, 14)):
        np.testing.assert_allclose(packed[:, start:stop], whole(layer, x[:, start:stop]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_cache_of_latent_vectors_gives_the_same(adapted):
    layer, x = make(), jax.random.normal(jax.random.key(2), (2, 13, 32))
    if adapted:  # the adapter of kv_b_proj belongs to the matrices that queries and outputs are multiplied by
        adapter = make_lora(layer.kv_b_proj, (LoRASettings(r=2, alpha=4.0),), jax.random.key(3))
        adapter.lora_b.set_value(0.3 * jax.random.normal(jax.random.key(4), adapter.lora_b.get_value().shape))
        plain = whole(layer, x)
        set_adapter(layer.kv_b_proj, adapter)
        assert float(jnp.abs(whole(layer, x) - plain).max()) > 0.01
    expected, cache, parts = whole(layer, x), layer.init_cache(1, 2, 16), []
    assert cache.k_RBKHT.shape == (1, 2, 1, SHAPE.rank + SHAPE.rotated_dim, 16) and not cache.v_RBKTH.size
    for start, stop in ((0, 7), (7, 8), (8, 13)):
        positions = np.broadcast_to(np.arange(start, stop), (2, stop - start))
        tokens = tokens_of(positions, np.ones_like(positions))
        filled = cache.positions_BT.at[:, start:stop].set(positions)
        out, cache = layer(x[:, start:stop], tokens, cache._replace(positions_BT=filled), jnp.int32(0), None)
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, rtol=0, atol=1e-5)
