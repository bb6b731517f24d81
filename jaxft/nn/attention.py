"""Causal grouped-query attention with packed segments, for training and with a cache."""

# B batch, S queries, T keys, D model, N query heads, K kv heads, G = N / K, H head_dim, R stacked layers

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.nn import cache as kv
from jaxft.nn.blockwise import causal_attention
from jaxft.nn.linear import Linear
from jaxft.nn.rope import rotate

# Finite, so that a row with nothing to look at (padding) gives numbers and not NaN.
MASKED = -1e30


class Tokens(NamedTuple):
    """What every layer needs to know of the tokens besides their vectors.

    positions_BS, segments_BS: int32; segment 0 is padding. cos_BSF, sin_BSF: the rotation.
    """

    positions_BS: jax.Array
    segments_BS: jax.Array
    cos_BSF: jax.Array
    sin_BSF: jax.Array


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes and switches of one attention layer."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    use_bias: bool = False
    use_output_bias: bool = False


class Attention(nnx.Module):
    """q, k, v projections, rotation, softmax(q k / sqrt(H)) v, output projection."""

    def __init__(
        self, shape: AttentionShape, *, stddev: float, dtype: jnp.dtype, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        def linear(inputs: int, outputs: int, use_bias: bool) -> Linear:
            return Linear(
                inputs, outputs, use_bias=use_bias, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.shape = shape
        self.q_proj = linear(shape.width, shape.heads * shape.head_dim, shape.use_bias)
        self.k_proj = linear(shape.width, shape.kv_heads * shape.head_dim, shape.use_bias)
        self.v_proj = linear(shape.width, shape.kv_heads * shape.head_dim, shape.use_bias)
        self.o_proj = linear(shape.heads * shape.head_dim, shape.width, shape.use_output_bias)

    def __call__(
        self,
        x_BSD: jax.Array,
        tokens: Tokens,
        cache: kv.LayerCache | None,
        layer: jax.Array,
        keys: jax.Array | None,
    ) -> tuple[jax.Array, kv.LayerCache | None]:
        """`layer` picks this layer's part of the cache stack; `keys` is four PRNG keys or None."""
        heads = (*x_BSD.shape[:2], -1, self.shape.head_dim)
        key = (None,) * 4 if keys is None else keys
        q_BSNH = rotate(self.q_proj(x_BSD, key[0]).reshape(heads), tokens.cos_BSF, tokens.sin_BSF)
        k_BSKH = rotate(self.k_proj(x_BSD, key[1]).reshape(heads), tokens.cos_BSF, tokens.sin_BSF)
        v_BSKH = self.v_proj(x_BSD, key[2]).reshape(heads)
        if cache is None:
            out_BSNH = causal_attention(q_BSNH, k_BSKH, v_BSKH, tokens.segments_BS)
        else:
            slots_BS = kv.slots_for(tokens.positions_BS, tokens.segments_BS, cache.slots)
            cache = kv.write(cache, layer, slots_BS, k_BSKH, v_BSKH)
            mask_BST = causal_mask(tokens.positions_BS, cache.positions_BT)
            out_BSNH = attend_cached(q_BSNH, cache.k_RBKHT[layer], cache.v_RBKTH[layer], mask_BST)
        return self.o_proj(out_BSNH.reshape(*x_BSD.shape[:2], -1), key[3]), cache


def causal_mask(
    queries_BS: jax.Array,
    keys_BT: jax.Array,
    query_segments_BS: jax.Array | None = None,
    key_segments_BT: jax.Array | None = None,
) -> jax.Array:
    """True where a query may look, [B, S, T]: at filled slots no later than itself, in its own segment."""
    keys_B1T, queries_BS1 = keys_BT[:, None, :], queries_BS[:, :, None]
    mask_BST = (keys_B1T >= 0) & (keys_B1T <= queries_BS1)
    if query_segments_BS is not None and key_segments_BT is not None:
        mask_BST &= query_segments_BS[:, :, None] == key_segments_BT[:, None, :]
    return mask_BST


def attend(q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask_BST: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v with the softmax in float32, [B, S, N, H] in q's dtype."""
    q_BSKGH = _grouped(q_BSNH, k_BTKH.shape[2])
    scores_BKGST = jnp.einsum("BSKGH,BTKH->BKGST", q_BSKGH, k_BTKH, preferred_element_type=jnp.float32)
    weights_BKGST = _weights(scores_BKGST, mask_BST, q_BSNH.shape[-1]).astype(v_BTKH.dtype)
    return jnp.einsum("BKGST,BTKH->BSKGH", weights_BKGST, v_BTKH).reshape(q_BSNH.shape)


def attend_cached(q_BSNH: jax.Array, k_BKHT: jax.Array, v_BKTH: jax.Array, mask_BST: jax.Array) -> jax.Array:
    """`attend` on keys and values as the cache lays them out."""
    batch, queries, heads, head_dim = q_BSNH.shape
    kv_heads, length = k_BKHT.shape[1], k_BKHT.shape[3]
    # Q = G * S on the left of both matmuls: in any other order XLA transposes the cache for each layer and token.
    q_BKQH = _grouped(q_BSNH, kv_heads).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    scores_BKQT = jnp.einsum("BKQH,BKHT->BKQT", q_BKQH, k_BKHT, preferred_element_type=jnp.float32)
    scores_BKGST = scores_BKQT.reshape(batch, kv_heads, heads // kv_heads, queries, length)
    weights_BKQT = _weights(scores_BKGST, mask_BST, head_dim).reshape(scores_BKQT.shape).astype(v_BKTH.dtype)
    out_BKQH = jnp.einsum("BKQT,BKTH->BKQH", weights_BKQT, v_BKTH)
    out_BKGSH = out_BKQH.reshape(batch, kv_heads, heads // kv_heads, queries, head_dim)
    return out_BKGSH.transpose(0, 3, 1, 2, 4).reshape(q_BSNH.shape)


def _grouped(q_BSNH: jax.Array, kv_heads: int) -> jax.Array:
    batch, queries, heads, head_dim = q_BSNH.shape
    return q_BSNH.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)


def _weights(scores_BKGST: jax.Array, mask_BST: jax.Array, head_dim: int) -> jax.Array:
    return jax.nn.softmax(jnp.where(mask_BST[:, None, None], scores_BKGST * head_dim**-0.5, MASKED), axis=-1)
