"""One new token of every row: what it takes from the cache, and how the tokens of all layers get into it at once.

A step that writes each layer's keys and values before the layer attends to them writes as often as there are layers.
On TPUs that costs more than it seems: the compiler lays the whole cache out for these small writes, copies every layer
of it into another layout to read it, and the whole of it wherever a loop over tokens begins and ends. Here layers only
read the cache and give their keys and values back. The stack writes them, one slot of a row at a time.
"""

# R stacked layers, B batch, K kv heads, G = N / K, N query heads, H head_dim, V value size, T slots

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from jaxft.nn import partition
from jaxft.nn.attention.cache import LayerCache, NewKeys
from jaxft.nn.attention.score_form import MASKED, PLAIN, ScoreForm, cap_scores, score_scale

ROWS_AT_ONCE = 8  # rows that one turn of the loop over rows writes
CACHE_DIMS: partition.Dimensions = (None, "batch", "tensor", None, None)


def writes_later(new_tokens: int) -> bool:
    """Whether layers leave the keys and values of so many new tokens of a row to their stack."""
    return new_tokens == 1 and partition.platform() == "tpu"


def attend_with_new(
    q_B1NH: jax.Array,
    k_BKHT: jax.Array,
    v_BKTV: jax.Array,
    new: NewKeys,
    mask_B1T: jax.Array,
    form: ScoreForm = PLAIN,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """`attend_cached` for one query a row, which also sees its own key, not in the cache yet: [B, 1, N, V].

    k_BKHT, v_BKTV, mask_B1T: of the tokens before it.
    """
    (batch, _, heads, head_dim), kv_heads = q_B1NH.shape, k_BKHT.shape[1]
    q_BKGH = q_B1NH.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    own_k_BK1H, own_v_BK1V = (
        x_B1KH.astype(cached.dtype).astype(jnp.float32).reshape(batch, kv_heads, 1, -1)
        for x_B1KH, cached in ((new.k_BSKH, k_BKHT), (new.v_BSKH, v_BKTV))
    )
    scores_BKGT = jnp.einsum("BKGH,BKHT->BKGT", q_BKGH, k_BKHT, preferred_element_type=jnp.float32)
    own_BKG1 = jnp.sum(q_BKGH.astype(jnp.float32) * own_k_BK1H, axis=-1, keepdims=True)
    scale = score_scale(form, head_dim)
    scores_BKGT, own_BKG1 = (cap_scores(x * scale, form.softcap) for x in (scores_BKGT, own_BKG1))
    scores_BKGT = jnp.where(mask_B1T[:, None], scores_BKGT, MASKED)
    top_BKG1 = jnp.maximum(jnp.max(scores_BKGT, axis=-1, keepdims=True), own_BKG1)
    sinks_KG1 = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(kv_heads, -1, 1)
    if sinks_KG1 is not None:
        top_BKG1 = jnp.maximum(top_BKG1, sinks_KG1)
    weights_BKGT, own_BKG1 = jnp.exp(scores_BKGT - top_BKG1), jnp.exp(own_BKG1 - top_BKG1)
    total_BKG1 = jnp.sum(weights_BKGT, axis=-1, keepdims=True) + own_BKG1
    if sinks_KG1 is not None:
        total_BKG1 += jnp.exp(sinks_KG1 - top_BKG1)
    weights_BKGT = (weights_BKGT / total_BKG1).astype(v_BKTV.dtype)
    seen_BKGV = jnp.einsum("BKGT,BKTV->BKGV", weights_BKGT, v_BKTV, preferred_element_type=jnp.float32)
    out_BKGV = seen_BKGV + own_BKG1 / total_BKG1 * own_v_BK1V
    return out_BKGV.astype(q_B1NH.dtype).reshape(batch, 1, heads, -1)


def write_new(cache: LayerCache, slots_B1: jax.Array, new_RB1KH: NewKeys) -> LayerCache:
    """The cache with one token of each row in its slot, in all layers. slots_B1: out of range for none.

    new_RB1KH: its arrays have a leading axis of layers. Over a mesh each device writes its own rows and heads.
    """
    k_RBKHT, v_RBKTV = (
        _written(cached, slots_B1[:, 0], x_RB1KH[:, :, 0].astype(cached.dtype), axis)
        for cached, x_RB1KH, axis in ((cache.k_RBKHT, new_RB1KH.k_BSKH, 4), (cache.v_RBKTH, new_RB1KH.v_BSKH, 3))
    )
    return cache._replace(k_RBKHT=k_RBKHT, v_RBKTH=v_RBKTV)


def _written(cache_RBKXY: jax.Array, slots_B: jax.Array, new_RBKH: jax.Array, axis: int) -> jax.Array:
    """axis: of the slots."""
    if not cache_RBKXY.size:
        return cache_RBKXY
    new_RBKXY = jnp.expand_dims(new_RBKH, axis)
    write = functools.partial(_write_rows, axis=axis)
    if partition.is_unsharded():
        return write(cache_RBKXY, slots_B, new_RBKXY)
    spec = partition.spec(cache_RBKXY.shape, CACHE_DIMS, uneven=None)
    specs = (spec, P(spec[1]), spec)
    return jax.shard_map(write, in_specs=specs, out_specs=spec, check_vma=False)(cache_RBKXY, slots_B, new_RBKXY)


def _write_rows(cache_RBKXY: jax.Array, slots_B: jax.Array, new_RBKXY: jax.Array, *, axis: int) -> jax.Array:
    """Writes rows that have a slot, some at a time; where fewer are left, the last of them is written again.

    To write something into the other rows would need what is there already, and reading that costs more than writing.
    """
    written_B = slots_B < cache_RBKXY.shape[axis]
    rows_B, count = jnp.argsort(~written_B), jnp.sum(written_B)
    at_once = min(ROWS_AT_ONCE, len(slots_B))

    def write(turn: jax.Array, cache_RBKXY: jax.Array) -> jax.Array:
        for number in range(at_once):
            row = rows_B[jnp.minimum(turn * at_once + number, count - 1)]
            at: list[jax.Array | int] = [0, row, 0, 0, 0]
            at[axis] = slots_B[row]
            new_R1KXY = jax.lax.dynamic_slice_in_dim(new_RBKXY, row, 1, 1)
            cache_RBKXY = _as_it_was(jax.lax.dynamic_update_slice(cache_RBKXY, new_R1KXY, at))
        return cache_RBKXY

    return jax.lax.fori_loop(0, (count + at_once - 1) // at_once, write, cache_RBKXY)


def _as_it_was(cache: jax.Array) -> jax.Array:
    """The cache in the layout in which programs take and return arrays, so that nothing has to copy it."""
    return with_layout_constraint(cache, Layout(tuple(range(cache.ndim)))) if partition.platform() == "tpu" else cache
