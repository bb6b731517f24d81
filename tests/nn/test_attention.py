"""Attention and its cache against sums written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.nn.attention import cache as kv
from jaxft.nn.attention.layer import Attention, attend, attend_cached, causal_mask
from jaxft.nn.attention.shape import AttentionShape
from jaxft.nn.norm import Norm, NormShape


def by_hand(q, k, v, mask):
    """[B, S, N, H] with loops over rows, queries and heads."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, s, n in np.ndindex(*q.shape[:3]):
        scores = k[b, :, n // group] @ q[b, s, n] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max()) * mask[b, s]
        out[b, s, n] = weights @ v[b, :, n // group] / weights.sum()
    return out


def drawn(heads, kv_heads):
    rng = np.random.default_rng(heads)
    return [rng.normal(size=(2, 5, n, 8)).astype(np.float32) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (6, 2)])
def test_attention_equals_sums_by_hand(heads, kv_heads):
    q, k, v = drawn(heads, kv_heads)
    positions, segments = jnp.array([[0, 1, 2, 0, 1]] * 2), jnp.array([[1, 1, 1, 2, 2]] * 2)
    mask = causal_mask(positions, positions, segments, segments)
    expected = by_hand(q, k, v, np.asarray(mask))
    np.testing.assert_allclose(jax.jit(attend)(q, k, v, mask), expected, rtol=0, atol=1e-5)
    cached = jax.jit(attend_cached)(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), mask)
    np.testing.assert_allclose(cached, expected, rtol=0, atol=1e-5)


def test_values_that_are_the_keys_are_taken_before_norm_and_normalised_without_a_parameter():
    shape = AttentionShape(width=12, heads=4, kv_heads=2, head_dim=8, qk_norm="head", v_norm=True, keys_as_values=True)
    norm = NormShape(eps=1e-6)
    options = {"stddev": 0.5, "dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(params=0)}
    layer = Attention(shape, norm, **options)
    assert not hasattr(layer, "v_proj")
    layer.k_norm.scale.set_value(jnp.full((8,), 3.0))
    x = np.random.default_rng(0).normal(size=(1, 3, 12)).astype(np.float32)
    _, k, v, _ = layer._project(x, (None,) * 4)
    keys = np.asarray(x @ layer.k_proj.kernel.get_value()).reshape(1, 3, 2, 8)
    unit = keys / np.sqrt(np.mean(keys**2, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(v, unit, rtol=0, atol=1e-5)
    np.testing.assert_allclose(k, 3 * unit, rtol=0, atol=1e-5)


def test_a_norm_without_a_parameter_has_none():
    norm = Norm(8, NormShape(eps=1e-6, scaled=False), dtype=jnp.float32, param_dtype=jnp.float32)
    assert not jax.tree.leaves(nnx.state(norm))


def test_the_mask_is_causal_within_a_document():
    positions, segments = jnp.array([[0, 1, 0, 0]]), jnp.array([[1, 1, 2, 0]])
    mask = np.asarray(causal_mask(positions, positions, segments, segments))[0].astype(int)
    np.testing.assert_array_equal(mask, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def test_empty_slots_are_never_seen():
    mask = causal_mask(jnp.array([[3]]), jnp.array([[2, -1, 3, 4]]))
    np.testing.assert_array_equal(np.asarray(mask)[0, 0], [True, False, True, False])


def test_a_row_that_sees_nothing_is_finite_and_so_is_its_gradient():
    q, k, v = drawn(4, 2)
    mask = jnp.zeros((2, 5, 5), bool)
    grads = jax.jit(jax.grad(lambda q, k, v: attend(q, k, v, mask).sum(), argnums=(0, 1, 2)))(q, k, v)
    assert all(np.isfinite(g).all() for g in grads)


def test_slots_of_padding_and_of_overwritten_tokens_are_out_of_range():
    positions, segments = jnp.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 0, 0]]), jnp.array([[1] * 6, [1, 1, 1, 0, 0, 0]])
    slots = kv.slots_for(positions, segments, 4)
    np.testing.assert_array_equal(slots, [[4, 4, 2, 3, 0, 1], [0, 1, 2, 4, 4, 4]])


def test_writing_reaches_one_layer_and_only_the_given_slots():
    cache = kv.empty(2, 2, 4, 1, 3, jnp.float32)
    k = jnp.arange(1.0, 13.0).reshape(2, 2, 1, 3)
    slots = jnp.array([[2, 4], [0, 1]])
    cache = kv.write(cache, jnp.int32(1), slots, k, -k)
    keys, values = cache.k_RBKHT.transpose(0, 1, 4, 2, 3), cache.v_RBKTH.transpose(0, 1, 3, 2, 4)
    assert not keys[0].any()
    np.testing.assert_array_equal(keys[1, 0, :, 0], [[0] * 3, [0] * 3, [1, 2, 3], [0] * 3])
    np.testing.assert_array_equal(keys[1, 1, :, 0], [[7, 8, 9], [10, 11, 12], [0] * 3, [0] * 3])
    np.testing.assert_array_equal(values, -keys)
    positions = kv.write_positions(cache.positions_BT, slots, jnp.array([[2, 3], [4, 5]]))
    np.testing.assert_array_equal(positions, [[-1, -1, 2, -1], [4, 5, -1, -1]])
