"""Causal grouped-query attention with packed segments, for training and with a cache."""

# B batch, S queries, T keys, D model, N query heads, K kv heads, G = N / K, H head_dim, R stacked layers

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.nn import partition
from jaxft.nn.attention import cache as kv
from jaxft.nn.attention.causal import causal_attention
from jaxft.nn.attention.rope import Rotation, rotate
from jaxft.nn.attention.score_form import MASKED, PLAIN, ScoreForm, cap_scores, score_scale
from jaxft.nn.linear import Linear
from jaxft.nn.norm import NormShape, RMSNorm
from jaxft.nn.storage import StorageDims


class Tokens(NamedTuple):
    """What every layer needs to know of the tokens besides their vectors.

    positions_BS, segments_BS: int32; segment 0 is padding. rotations: one for each of the decoder's ropes.
    cached_BT: positions in the slots of the layer's cache before these tokens came, -1 where empty.
    virtual_BS: which virtual token stands there, negative for none; None where the model has no such tokens.
    """

    positions_BS: jax.Array
    segments_BS: jax.Array
    rotations: tuple[Rotation, ...]
    cached_BT: jax.Array | None = None
    virtual_BS: jax.Array | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes and switches of one attention layer.

    form: window, scale and cap of the scores. qk_norm: normalises queries and keys before the rotation, each head by
    itself or the whole projection. fused: q, k and v are one `qkv_proj`, in this order. sinks: a learnt score for each
    head that takes a share of the softmax (arXiv:2309.17453). rope: which of the decoder's ropes turns this layer.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    use_bias: bool = False
    use_output_bias: bool = False
    form: ScoreForm = PLAIN
    qk_norm: Literal["head", "whole"] | None = None
    fused: bool = False
    sinks: bool = False
    rope: int = 0


class Attention(nnx.Module):
    """q, k, v projections, rotation, softmax(q k / sqrt(H)) v, output projection.

    prefix: an optional slot; `prefix(k_BSKH, v_BSKH, virtual_BS)` puts keys and values where virtual tokens stand.
    """

    def __init__(
        self,
        shape: AttentionShape,
        norm: NormShape,
        *,
        stddev: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        def linear(inputs: int, outputs: int, use_bias: bool, tp_side: str = "outputs") -> Linear:
            types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
            return Linear(inputs, outputs, use_bias=use_bias, tp_side=tp_side, stddev=stddev, **types)

        self.shape = shape
        q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        if shape.fused:
            self.qkv_proj = linear(shape.width, q_width + 2 * kv_width, shape.use_bias)
        else:
            self.q_proj = linear(shape.width, q_width, shape.use_bias)
            self.k_proj = linear(shape.width, kv_width, shape.use_bias)
            self.v_proj = linear(shape.width, kv_width, shape.use_bias)
        self.o_proj = linear(q_width, shape.width, shape.use_output_bias, "inputs")
        if shape.qk_norm is not None:
            q_norm, kv_norm = (shape.head_dim,) * 2 if shape.qk_norm == "head" else (q_width, kv_width)
            self.q_norm = RMSNorm(q_norm, norm, dtype=dtype, param_dtype=param_dtype)
            self.k_norm = RMSNorm(kv_norm, norm, dtype=dtype, param_dtype=param_dtype)
        self.prefix = nnx.data(None)
        self.sinks = nnx.Param(jnp.zeros((shape.heads,), param_dtype)) if shape.sinks else None

    def __call__(
        self,
        x_BSD: jax.Array,
        tokens: Tokens,
        cache: kv.LayerCache | None,
        layer: jax.Array,
        keys: jax.Array | None,
    ) -> tuple[jax.Array, kv.LayerCache | None]:
        """`layer` picks this layer's part of the cache stack; `keys` is four PRNG keys or None."""
        key = (None,) * 4 if keys is None else keys
        form, sinks_N = self.shape.form, None if self.sinks is None else self.sinks.get_value()
        q_BSNH, k_BSKH, v_BSKH = self._projected(x_BSD, key)
        rotation = tokens.rotations[self.shape.rope]
        q_BSNH, k_BSKH = rotate(q_BSNH, rotation), rotate(k_BSKH, rotation)
        if self.prefix is not None:
            k_BSKH, v_BSKH = self.prefix(k_BSKH, v_BSKH, tokens.virtual_BS)
        if rotation.queries_BS is not None:
            q_BSNH = (q_BSNH * rotation.queries_BS[:, :, None, None]).astype(q_BSNH.dtype)
        if cache is None:
            out_BSNH = causal_attention(q_BSNH, k_BSKH, v_BSKH, tokens.segments_BS, form, sinks_N)
        elif form.window is not None and x_BSD.shape[1] > 1 and cache.slots >= form.window:
            # Writing first would take keys away that the first of these tokens still sees.
            k_BKHT, v_BKTH, keys_BT = _with_cached(cache, layer, k_BSKH, v_BSKH, tokens)
            mask_BST = causal_mask(tokens.positions_BS, keys_BT, window=form.window)
            out_BSNH = attend_cached(q_BSNH, k_BKHT, v_BKTH, mask_BST, form, sinks_N)
            cache = self._written(cache, layer, k_BSKH, v_BSKH, tokens)
        else:
            cache = self._written(cache, layer, k_BSKH, v_BSKH, tokens)
            mask_BST = causal_mask(tokens.positions_BS, cache.positions_BT, window=form.window)
            out_BSNH = attend_cached(q_BSNH, cache.k_RBKHT[layer], cache.v_RBKTH[layer], mask_BST, form, sinks_N)
        out_BSX = partition.split(out_BSNH.reshape(*x_BSD.shape[:2], -1), "batch", "sequence", "tensor")
        return self.o_proj(out_BSX, key[3]), cache

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"sinks": StorageDims((None,))}

    def _projected(self, x_BSD: jax.Array, key: tuple[jax.Array | None, ...] | jax.Array) -> tuple[jax.Array, ...]:
        """q [B, S, N, H], k and v [B, S, K, H], normalised where the family does so."""
        shape = self.shape
        heads = (*x_BSD.shape[:2], -1, shape.head_dim)
        if shape.fused:
            ends = (shape.heads * shape.head_dim, (shape.heads + shape.kv_heads) * shape.head_dim)
            q, k, v = jnp.split(self.qkv_proj(x_BSD, key[0]), ends, axis=-1)
        else:
            q, k, v = self.q_proj(x_BSD, key[0]), self.k_proj(x_BSD, key[1]), self.v_proj(x_BSD, key[2])
        if shape.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BSNH, k_BSKH, v_BSKH = (
            partition.split(x.reshape(heads), "batch", "sequence", "tensor", None) for x in (q, k, v)
        )
        if shape.qk_norm == "head":
            q_BSNH, k_BSKH = self.q_norm(q_BSNH), self.k_norm(k_BSKH)
        return q_BSNH, k_BSKH, v_BSKH

    def _written(self, cache, layer, k_BSKH, v_BSKH, tokens: Tokens) -> kv.LayerCache:
        slots_BS = kv.slots_for(tokens.positions_BS, tokens.segments_BS, cache.slots)
        return kv.write(cache, layer, slots_BS, k_BSKH, v_BSKH)


def _with_cached(cache, layer, k_BSKH, v_BSKH, tokens: Tokens) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys, values and positions of what a layer's cache held and, behind it, of the new tokens."""
    k_BKHS, v_BKSH = k_BSKH.transpose(0, 2, 3, 1), v_BSKH.transpose(0, 2, 1, 3)
    k_BKHT = jnp.concatenate([cache.k_RBKHT[layer], k_BKHS.astype(cache.k_RBKHT.dtype)], axis=3)
    v_BKTH = jnp.concatenate([cache.v_RBKTH[layer], v_BKSH.astype(cache.v_RBKTH.dtype)], axis=2)
    new_BS = jnp.where(tokens.segments_BS > 0, tokens.positions_BS, -1)
    return k_BKHT, v_BKTH, jnp.concatenate([tokens.cached_BT, new_BS], axis=1)


def causal_mask(
    queries_BS: jax.Array,
    keys_BT: jax.Array,
    query_segments_BS: jax.Array | None = None,
    key_segments_BT: jax.Array | None = None,
    *,
    window: int | None = None,
) -> jax.Array:
    """True where a query may look, [B, S, T]: at filled slots no later than itself, in its own segment.

    window: at most so many tokens back, itself included.
    """
    keys_B1T, queries_BS1 = keys_BT[:, None, :], queries_BS[:, :, None]
    mask_BST = (keys_B1T >= 0) & (keys_B1T <= queries_BS1)
    if window is not None:
        mask_BST &= keys_B1T > queries_BS1 - window
    if query_segments_BS is not None and key_segments_BT is not None:
        mask_BST &= query_segments_BS[:, :, None] == key_segments_BT[:, None, :]
    return mask_BST


def attend(
    q_BSNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    mask_BST: jax.Array,
    form: ScoreForm = PLAIN,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v with the softmax in float32, [B, S, N, H] in q's dtype."""
    q_BSKGH = _grouped(q_BSNH, k_BTKH.shape[2])
    scores_BKGST = jnp.einsum("BSKGH,BTKH->BKGST", q_BSKGH, k_BTKH, preferred_element_type=jnp.float32)
    weights_BKGST = _weights(scores_BKGST, mask_BST, q_BSNH.shape[-1], form, sinks_N).astype(v_BTKH.dtype)
    return jnp.einsum("BKGST,BTKH->BSKGH", weights_BKGST, v_BTKH).reshape(q_BSNH.shape)


def attend_cached(
    q_BSNH: jax.Array,
    k_BKHT: jax.Array,
    v_BKTH: jax.Array,
    mask_BST: jax.Array,
    form: ScoreForm = PLAIN,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """`attend` on keys and values as the cache lays them out."""
    batch, queries, heads, head_dim = q_BSNH.shape
    kv_heads, length = k_BKHT.shape[1], k_BKHT.shape[3]
    # Q = G * S on the left of both matmuls: in any other order XLA transposes the cache for each layer and token.
    q_BKQH = _grouped(q_BSNH, kv_heads).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    scores_BKQT = jnp.einsum("BKQH,BKHT->BKQT", q_BKQH, k_BKHT, preferred_element_type=jnp.float32)
    scores_BKGST = scores_BKQT.reshape(batch, kv_heads, heads // kv_heads, queries, length)
    weights_BKGST = _weights(scores_BKGST, mask_BST, head_dim, form, sinks_N).astype(v_BKTH.dtype)
    weights_BKQT = weights_BKGST.reshape(scores_BKQT.shape)
    out_BKQH = jnp.einsum("BKQT,BKTH->BKQH", weights_BKQT, v_BKTH)
    out_BKGSH = out_BKQH.reshape(batch, kv_heads, heads // kv_heads, queries, head_dim)
    return out_BKGSH.transpose(0, 3, 1, 2, 4).reshape(q_BSNH.shape)


def _grouped(q_BSNH: jax.Array, kv_heads: int) -> jax.Array:
    batch, queries, heads, head_dim = q_BSNH.shape
    return q_BSNH.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)


def _weights(
    scores_BKGST: jax.Array, mask_BST: jax.Array, head_dim: int, form: ScoreForm, sinks_N: jax.Array | None
) -> jax.Array:
    scores_BKGST = cap_scores(scores_BKGST * score_scale(form, head_dim), form.softcap)
    scores_BKGST = jnp.where(mask_BST[:, None, None], scores_BKGST, MASKED)
    if sinks_N is None:
        return jax.nn.softmax(scores_BKGST, axis=-1)
    sinks_KG11 = sinks_N.astype(jnp.float32).reshape(scores_BKGST.shape[1:3])[..., None, None]
    sinks_BKGS1 = jnp.broadcast_to(sinks_KG11, (*scores_BKGST.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores_BKGST, sinks_BKGS1], axis=-1), axis=-1)[..., :-1]
