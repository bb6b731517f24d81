"""Queries in balanced order: the same attention and gradients as on one device, and the same work for every device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.nn import partition
from jaxft.nn.attention.causal import causal_attention
from jaxft.nn.attention.kernels import balanced, splash
from jaxft.nn.attention.layer import attend, causal_mask
from jaxft.nn.attention.score_form import PLAIN

PARTS, LENGTH = 4, 1024
SEGMENTS = jnp.repeat(jnp.array([1, 2, 3, 0]), jnp.array([300, 90, 610, 24]))[None]
REAL = np.asarray(SEGMENTS > 0)


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_all_parts_have_the_same_keys_to_look_at(parts):
    order = balanced.query_order(LENGTH, parts)
    assert sorted(order) == list(range(LENGTH))
    keys = (order + 1).reshape(parts, -1).sum(axis=1)
    assert len(set(keys)) == 1
    causal = np.arange(1, LENGTH + 1).reshape(parts, -1).sum(axis=1)
    assert causal[-1] / causal.mean() == pytest.approx(2 - 1 / parts, rel=0.01)


def test_rows_that_are_no_pairs_of_chunks_are_refused():
    with pytest.raises(ValueError, match="1001 positions are not 8 chunks"):
        balanced.query_order(1001, 4)
    assert splash.balances(1024, 4, None)
    assert not any([splash.balances(1024, 1, None), splash.balances(1024, 4, 256), splash.balances(1536, 8, None)])


def test_values_and_gradients_are_those_of_one_device(monkeypatch):
    monkeypatch.setattr(partition, "platform", lambda: "tpu")
    monkeypatch.setattr(splash, "kernel", partial(splash.kernel, interpret=True))
    q, k, v = (
        jax.random.normal(key, (1, LENGTH, heads, 32))
        for key, heads in zip(jax.random.split(jax.random.key(0), 3), (2, 1, 1), strict=True)
    )
    weight = jnp.where(SEGMENTS > 0, 1.0, 0.0)[..., None, None] * jnp.cos(jnp.arange(32))

    def plain(q, k, v):
        positions = jnp.arange(LENGTH)[None]
        return attend(q, k, v, causal_mask(positions, positions, SEGMENTS, SEGMENTS), PLAIN, None)

    def ours(q, k, v):
        return causal_attention(q, k, v, SEGMENTS)

    def with_gradients(attention):
        def total(*qkv):
            out = attention(*qkv)
            return jnp.sum(out * weight), out

        (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
        return out, gradients

    with jax.default_matmul_precision("highest"):
        expected, expected_gradients = with_gradients(plain)
        mesh = jax.make_mesh((PARTS,), ("context",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:PARTS])
        with jax.set_mesh(mesh):
            out, gradients = with_gradients(ours)
    np.testing.assert_allclose(np.asarray(out)[REAL], np.asarray(expected)[REAL], rtol=0, atol=2e-5)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_results_return_to_where_queries_came_from():
    mesh = jax.make_mesh((PARTS,), ("context",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:PARTS])
    positions = jnp.arange(16)[None]
    specs = {"in_specs": jax.P(None, "context"), "out_specs": jax.P(None, "context")}

    def there(x):
        # The same positions by way of the exchange and of the whole rows.
        own = balanced.own_columns(jax.lax.all_gather(x, "context", axis=1, tiled=True))
        return jnp.concatenate([balanced.take_queries(x), own])

    with jax.set_mesh(mesh):
        moved = jax.shard_map(there, **specs, check_vma=False)(positions)
        back = jax.shard_map(lambda x: balanced.return_results(balanced.take_queries(x)), **specs)(positions)
    np.testing.assert_array_equal(moved, [balanced.query_order(16, PARTS)] * 2)
    np.testing.assert_array_equal(back, positions)
