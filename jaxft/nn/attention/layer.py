"""The attention layer: causal, grouped-query, over packed segments in training or with a KV cache."""

# B batch, S queries, T keys, D model, N query heads, K kv heads, G = N / K, H head_dim, R stacked layers

import dataclasses
import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.errors import ModelError
from jaxft.nn import partition
from jaxft.nn.attention import cache as kv
from jaxft.nn.attention.causal import causal_attention
from jaxft.nn.attention.decoding import attend_with_new, writes_later
from jaxft.nn.attention.rope import Rotation, rotate
from jaxft.nn.attention.saving import Early, keep
from jaxft.nn.attention.score_form import MASKED, PLAIN, ScoreForm, cap_scores, score_scale
from jaxft.nn.attention.shape import AttentionShape
from jaxft.nn.attention.unshare import gather_back, unshare, unshare_heads
from jaxft.nn.linear import Linear, apply_layers
from jaxft.nn.norm import Norm, NormShape
from jaxft.nn.storage import StorageDims
from jaxft.nn.whole_documents import WholeDocuments


class Kept(NamedTuple):
    """Keys and values of a layer, for later layers that have none of their own.

    k_BSKH, v_BSKH: of the tokens of this call, as the layer attends to them. before, cache: the cache of its stack
    without and with these tokens; None in training. layer: its index in the stack.
    """

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    before: kv.LayerCache | None = None
    cache: kv.LayerCache | None = None
    layer: int = 0


class Tokens(NamedTuple):
    """Properties of the tokens, besides their vectors, that every layer needs.

    positions_BS, segments_BS: int32; segment 0 is padding. rotations: one for each of the decoder's ropes.
    cached_BT: positions in the slots of the layer's cache before these tokens, -1 for an empty slot; None without a
    cache. virtual_BS: the number of the virtual token at each position, negative at other tokens; None if the model has
    no virtual tokens. whole: where attention finds whole documents, if some share their first tokens; rotations and
    virtual_BS are then those of its rows. kept: keys and values for a layer that has none of its own.
    """

    positions_BS: jax.Array
    segments_BS: jax.Array
    rotations: tuple[Rotation, ...]
    cached_BT: jax.Array | None = None
    virtual_BS: jax.Array | None = None
    whole: WholeDocuments[jax.Array] | None = None
    kept: Kept | None = None

    def positions_before(self) -> jax.Array:
        """cached_BT. Raises ModelError without it."""
        if self.cached_BT is None:
            raise ModelError("a layer that reads its cache before it is written needs Tokens.cached_BT: set it")
        return self.cached_BT


class Prefix(Protocol):
    """Learnt keys and values for virtual tokens, for the slot `Attention.prefix`. peft_type: its name in PEFT."""

    peft_type: str

    def __call__(
        self, k_BSKH: jax.Array, v_BSKH: jax.Array, virtual_BS: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """k_BSKH and v_BSKH, replaced at virtual tokens by those of the module. virtual_BS: as in `Tokens`."""


class Attention(nnx.Module):
    """q, k, v projections, rotation, softmax(q k / sqrt(H)) v, output projection.

    prefix: a slot for a `Prefix`, empty (None) at first.
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
        linear = functools.partial(Linear, stddev=stddev, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.shape, self.dtype = shape, dtype
        q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        projection, early = functools.partial(linear, shape.width, use_bias=shape.use_bias), Early.of(shape)
        if shape.fused:
            self.qkv_proj = projection(q_width + 2 * kv_width, keep=keep(early.queries))
        else:
            self.q_proj = projection(q_width * (2 if shape.gated else 1), keep=keep(early.queries))
            self.k_proj = projection(kv_width, keep=keep(early.keys))
            if not shape.keys_as_values:
                self.v_proj = projection(kv_width, keep=keep(early.values))
        self.o_proj = linear(q_width, shape.width, use_bias=shape.use_output_bias, tp_side="inputs")
        if shape.qk_norm is not None:
            q_norm, kv_norm = (shape.head_dim,) * 2 if shape.qk_norm == "head" else (q_width, kv_width)
            of_heads = dataclasses.replace(norm, scaled=False) if shape.unscaled_qk else norm
            self.q_norm = Norm(q_norm, of_heads, dtype=dtype, param_dtype=param_dtype)
            self.k_norm = Norm(kv_norm, of_heads, dtype=dtype, param_dtype=param_dtype)
        if shape.v_norm:
            unscaled = dataclasses.replace(norm, scaled=False)
            self.v_norm = Norm(shape.head_dim, unscaled, dtype=dtype, param_dtype=param_dtype)
        self.prefix: Prefix | None = nnx.data(None)
        self.sinks = nnx.Param(jnp.zeros((shape.heads,), param_dtype)) if shape.sinks else None

    def __call__(
        self,
        x_BSD: jax.Array,
        tokens: Tokens,
        cache: kv.LayerCache | None,
        layer: jax.Array,
        keys: jax.Array | None,
    ) -> tuple[jax.Array, kv.LayerCache | kv.NewKeys | None]:
        """layer: this layer's index in the cache's stack. keys: four PRNG keys for dropout in adapters, or None."""
        return self.with_keys(x_BSD, tokens, cache, layer, keys)[:2]

    def with_keys(
        self,
        x_BSD: jax.Array,
        tokens: Tokens,
        cache: kv.LayerCache | None,
        layer: jax.Array,
        keys: jax.Array | None,
    ) -> tuple[jax.Array, kv.LayerCache | kv.NewKeys | None, Kept]:
        """As a call, and the keys and values of these tokens."""
        key = (None,) * 4 if keys is None else keys
        form, reach, sinks_N = self.shape.form, self.shape.reach, None if self.sinks is None else self.sinks.get_value()
        later = cache is not None and writes_later(x_BSD.shape[1])
        q_BSNH, k_BSKH, v_BSKH, gate_BSNH = self._project(x_BSD, key, separate=later)
        positions_BS, segments_BS = tokens.positions_BS, tokens.segments_BS
        if tokens.whole is not None:
            q_BSNH, k_BSKH, v_BSKH = (unshare_heads(x, tokens.whole) for x in (q_BSNH, k_BSKH, v_BSKH))
            segments_BS = tokens.whole.segments_BWS.reshape(q_BSNH.shape[:2])
            positions_BS = unshare(positions_BS[..., None], tokens.whole)[..., 0]
        q_BSNH, k_BSKH = self._rotated(q_BSNH, k_BSKH, tokens, positions_BS)
        if self.prefix is not None:
            k_BSKH, v_BSKH = self.prefix(k_BSKH, v_BSKH, tokens.virtual_BS)
        q_BSNH, k_BSKH, v_BSKH = Early.of(self.shape).name_late(q_BSNH, k_BSKH, v_BSKH)
        mask = functools.partial(causal_mask, positions_BS, window=form.window, chunk=self.shape.chunk)
        written: kv.LayerCache | kv.NewKeys | None = None
        if cache is None:
            segments_BS = _by_chunk(segments_BS, positions_BS, self.shape.chunk)
            out_BSNH = causal_attention(q_BSNH, k_BSKH, v_BSKH, segments_BS, form, sinks_N)
        elif later:
            mask_BST, written = mask(tokens.positions_before()), kv.NewKeys(k_BSKH, v_BSKH)
            k_BKHT, v_BKTH = cache.k_RBKHT[layer], cache.v_RBKTH[layer]
            out_BSNH = attend_with_new(q_BSNH, k_BKHT, v_BKTH, written, mask_BST, form, sinks_N)
        elif reach is not None and x_BSD.shape[1] > 1 and cache.slots >= reach:
            # Writing first would overwrite keys that the first of these tokens still sees.
            k_BKHT, v_BKTH, keys_BT = keys_with_cached(cache, layer, k_BSKH, v_BSKH, tokens)
            out_BSNH = attend_cached(q_BSNH, k_BKHT, v_BKTH, mask(keys_BT), form, sinks_N)
            written = self._write(cache, layer, k_BSKH, v_BSKH, tokens)
        else:
            written = self._write(cache, layer, k_BSKH, v_BSKH, tokens)
            k_BKHT, v_BKTH = written.k_RBKHT[layer], written.v_RBKTH[layer]
            out_BSNH = attend_cached(q_BSNH, k_BKHT, v_BKTH, mask(written.positions_BT), form, sinks_N)
        if tokens.whole is not None:
            out_BSNH = gather_back(out_BSNH, tokens.whole)
        if gate_BSNH is not None:
            out_BSNH = out_BSNH * jax.nn.sigmoid(gate_BSNH)
        out_BSX = partition.split(out_BSNH.reshape(*x_BSD.shape[:2], -1), "batch", "sequence", "tensor")
        return self.o_proj(out_BSX, key[3]), written, Kept(k_BSKH, v_BSKH)

    def init_cache(self, layers: int, batch: int, length: int) -> kv.LayerCache | None:
        """The empty cache of a stack of such layers for rows of up to `length` tokens; only for those within reach."""
        shape = self.shape
        slots = min(length, shape.reach or length)
        return kv.empty(layers, batch, slots, shape.kv_heads, shape.head_dim, self.dtype)

    def no_keys(self, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
        """Zeros in the shape of keys and of values of these tokens."""
        rows, length = tokens.positions_BS.shape
        rows *= 1 if tokens.whole is None else tokens.whole.index_BWS.shape[1]
        zeros = jnp.zeros((rows, length, self.shape.kv_heads, self.shape.head_dim), self.dtype)
        zeros = partition.split(zeros, "batch", "sequence", "tensor", None)
        return zeros, zeros

    def storage_dims(self) -> dict[str, StorageDims]:
        return {"sinks": StorageDims((None,))}

    def _project(
        self, x_BSD: jax.Array, key: tuple[jax.Array | None, ...] | jax.Array, *, separate: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """q [B, S, N, H], k and v [B, S, K, H], normalised as the shape says; the gate [B, S, N, H] or None.

        separate: keeps the compiler from laying out weights by heads, for which it would copy those of all layers.
        """
        shape = self.shape
        heads = (*x_BSD.shape[:2], -1, shape.head_dim)
        if shape.fused:
            ends = (shape.heads * shape.head_dim, (shape.heads + shape.kv_heads) * shape.head_dim)
            q, k, v = jnp.split(self.qkv_proj(x_BSD, key[0]), ends, axis=-1)
        else:
            layers = [self.q_proj, self.k_proj] + ([] if shape.keys_as_values else [self.v_proj])
            q, k, *v_alone = apply_layers(layers, x_BSD, [key[index] for index in range(len(layers))])
            v = v_alone[0] if v_alone else k
        q, k, v = jax.lax.optimization_barrier((q, k, v)) if separate else (q, k, v)
        gate_BSNH = None
        if shape.gated:
            q, gate_BSNH = jnp.split(q.reshape(*heads[:-1], 2 * shape.head_dim), 2, axis=-1)
        if shape.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BSNH, k_BSKH, v_BSKH = (
            partition.split(x.reshape(heads), "batch", "sequence", "tensor", None) for x in (q, k, v)
        )
        if shape.qk_norm == "head" and not shape.normed_after_rope:
            q_BSNH, k_BSKH = self.q_norm(q_BSNH), self.k_norm(k_BSKH)
        if shape.v_norm:
            v_BSKH = self.v_norm(v_BSKH)
        return q_BSNH, k_BSKH, v_BSKH, gate_BSNH

    def _rotated(
        self, q_BSNH: jax.Array, k_BSKH: jax.Array, tokens: Tokens, positions_BS: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Queries and keys with their positions, as this layer encodes them. positions_BS: those of the queries."""
        shape = self.shape
        rotation = None if shape.rope is None else tokens.rotations[shape.rope]
        if rotation is not None:
            q_BSNH, k_BSKH = (rotate(x, rotation, pairs=shape.pairs) for x in (q_BSNH, k_BSKH))
        if shape.normed_after_rope:
            q_BSNH, k_BSKH = self.q_norm(q_BSNH), self.k_norm(k_BSKH)
        if rotation is not None and rotation.queries_BS is not None:
            q_BSNH = (q_BSNH * rotation.queries_BS[:, :, None, None]).astype(q_BSNH.dtype)
        if shape.growth is not None:
            grown_BS = 1 + shape.growth.factor * jnp.log1p(
                ((positions_BS + 1) // shape.growth.every).astype(jnp.float32)
            )
            q_BSNH = (q_BSNH * grown_BS[:, :, None, None]).astype(q_BSNH.dtype)
        return q_BSNH, k_BSKH

    def _write(
        self, cache: kv.LayerCache, layer: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, tokens: Tokens
    ) -> kv.LayerCache:
        slots_BS = kv.slots_for(tokens.positions_BS, tokens.segments_BS, cache.slots)
        # Heads that the tensor axis does not divide are whole. Otherwise the compiler chooses a layout of its own for
        # them, and gathers the cache for every token.
        whole = functools.partial(partition.split, uneven=None)
        k_BSKH, v_BSKH = (whole(x, "batch", None, "tensor", None) for x in (k_BSKH, v_BSKH))
        cache = kv.write(cache, layer, slots_BS, k_BSKH, v_BSKH)
        k_RBKHT, v_RBKTH = (whole(x, None, "batch", "tensor", None, None) for x in (cache.k_RBKHT, cache.v_RBKTH))
        return cache._replace(k_RBKHT=k_RBKHT, v_RBKTH=v_RBKTH)


def keys_with_cached(
    cache: kv.LayerCache, layer: jax.Array | int, k_BSKH: jax.Array, v_BSKH: jax.Array, tokens: Tokens
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys, values and positions of the tokens in a layer's cache followed by those of the new tokens."""
    k_BKHS, v_BKSH = k_BSKH.transpose(0, 2, 3, 1), v_BSKH.transpose(0, 2, 1, 3)
    k_BKHT = jnp.concatenate([cache.k_RBKHT[layer], k_BKHS.astype(cache.k_RBKHT.dtype)], axis=3)
    v_BKTH = jnp.concatenate([cache.v_RBKTH[layer], v_BKSH.astype(cache.v_RBKTH.dtype)], axis=2)
    new_BS = jnp.where(tokens.segments_BS > 0, tokens.positions_BS, -1)
    return k_BKHT, v_BKTH, jnp.concatenate([tokens.positions_before(), new_BS], axis=1)


def _by_chunk(segments_BS: jax.Array, positions_BS: jax.Array, chunk: int | None) -> jax.Array:
    """The segments cut into chunks, each a segment of its own; 0 stays padding."""
    if chunk is None:
        return segments_BS
    most = segments_BS.shape[1] // chunk + 1  # chunks of a segment, which is no longer than its row
    return jnp.where(segments_BS > 0, segments_BS * most + positions_BS // chunk, 0)


def causal_mask(
    queries_BS: jax.Array,
    keys_BT: jax.Array,
    query_segments_BS: jax.Array | None = None,
    key_segments_BT: jax.Array | None = None,
    *,
    window: int | None = None,
    chunk: int | None = None,
) -> jax.Array:
    """True for the keys that a query sees, [B, S, T]: filled slots of its own segment, up to its own position.

    window: the number of latest tokens that a query sees, including itself; None for all. chunk: as in AttentionShape.
    """
    keys_B1T, queries_BS1 = keys_BT[:, None, :], queries_BS[:, :, None]
    mask_BST = (keys_B1T >= 0) & (keys_B1T <= queries_BS1)
    if window is not None:
        mask_BST &= keys_B1T > queries_BS1 - window
    if chunk is not None:
        mask_BST &= keys_B1T // chunk == queries_BS1 // chunk
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
    """softmax(q k^T / sqrt(H)) v with a float32 softmax, [B, S, N, H] in q's dtype."""
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
    """`attend` on keys and values in the layout of the cache. The result has the values' size."""
    batch, queries, heads, head_dim = q_BSNH.shape
    kv_heads, length = k_BKHT.shape[1], k_BKHT.shape[3]
    # Q = G * S is on the left of both matmuls: in any other order XLA transposes the cache for every layer and token.
    q_BKQH = _grouped(q_BSNH, kv_heads).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    scores_BKQT = jnp.einsum("BKQH,BKHT->BKQT", q_BKQH, k_BKHT, preferred_element_type=jnp.float32)
    scores_BKGST = scores_BKQT.reshape(batch, kv_heads, heads // kv_heads, queries, length)
    weights_BKGST = _weights(scores_BKGST, mask_BST, head_dim, form, sinks_N).astype(v_BKTH.dtype)
    weights_BKQT = weights_BKGST.reshape(scores_BKQT.shape)
    out_BKQH = jnp.einsum("BKQT,BKTH->BKQH", weights_BKQT, v_BKTH)
    out_BKGSH = out_BKQH.reshape(batch, kv_heads, heads // kv_heads, queries, -1)
    return out_BKGSH.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, -1)


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
