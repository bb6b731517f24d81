"""The key/value cache of generation: preallocated, one entry per stack of layers, slots addressed by position."""

# R stacked layers, B batch, S new tokens, T slots, K kv heads, H head_dim

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LayerCache(NamedTuple):
    """Keys and values of a stack of layers, and the position of the token in each slot.

    The innermost axis of keys is the slots, that of values the head dimension. So neither matmul of a decoding step has
    to transpose the cache first, which would cost more on a CPU than the matmul itself. positions_BT: int32 position of
    the token in a slot, -1 for an empty slot. Token p is in slot p % T, so a sliding-window layer needs only as many
    slots as its window is long.
    """

    k_RBKHT: jax.Array
    v_RBKTH: jax.Array
    positions_BT: jax.Array

    @property
    def slots(self) -> int:
        """The number of tokens of each row that fit."""
        return self.v_RBKTH.shape[3]


Cache = tuple[LayerCache, ...]


def empty(layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> LayerCache:
    """A cache without tokens."""
    keys, values = (layers, batch, kv_heads, head_dim, slots), (layers, batch, kv_heads, slots, head_dim)
    return LayerCache(jnp.zeros(keys, dtype), jnp.zeros(values, dtype), jnp.full((batch, slots), -1, jnp.int32))


def slots_for(positions_BS: jax.Array, segments_BS: jax.Array, slots: int) -> jax.Array:
    """The slot of each new token, [B, S]; `slots` (out of range, so dropped) for padding and for tokens that a later
    token of the same call would overwrite.
    """
    last_B1 = jnp.max(jnp.where(segments_BS > 0, positions_BS, -1), axis=1, keepdims=True)
    keep_BS = (segments_BS > 0) & (positions_BS > last_B1 - slots)
    return jnp.where(keep_BS, positions_BS % slots, slots)


def write(cache: LayerCache, layer: jax.Array, slots_BS: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> LayerCache:
    """The cache with new keys and values of one layer in their slots."""
    return cache._replace(
        k_RBKHT=_scatter(cache.k_RBKHT, 4, layer, slots_BS, k_BSKH),
        v_RBKTH=_scatter(cache.v_RBKTH, 3, layer, slots_BS, v_BSKH),
    )


def _scatter(
    cache_RBKXY: jax.Array, slot_axis: int, layer: jax.Array, slots_BS: jax.Array, new_BSKH: jax.Array
) -> jax.Array:
    """`cache.at[layer, b, ..., slots_BS[b]].set(new_BSKH[b])` for every row b, out of range dropped.

    Rows are a batching dimension of the scatter, so that the compiler knows that no row is written into another: over
    a mesh each device writes its own, and nothing is exchanged.
    """
    at_BS2 = jnp.stack([jnp.broadcast_to(layer, slots_BS.shape), slots_BS], axis=-1)
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2, 3),
        inserted_window_dims=(0, slot_axis),
        scatter_dims_to_operand_dims=(0, slot_axis),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(cache_RBKXY, at_BS2, new_BSKH.astype(cache_RBKXY.dtype), dimensions, mode="drop")


def write_positions(positions_BT: jax.Array, slots_BS: jax.Array, new_BS: jax.Array) -> jax.Array:
    """positions_BT with the positions of new tokens in their slots."""

    def write_row(positions_T: jax.Array, slots_S: jax.Array, new_S: jax.Array) -> jax.Array:
        return positions_T.at[slots_S].set(new_S, mode="drop")

    return jax.vmap(write_row)(positions_BT, slots_BS, new_BS)


def store(cache: LayerCache, part: LayerCache, rows: jax.Array | slice) -> LayerCache:
    """The cache with whole rows replaced by the rows of `part`, which may have fewer slots.

    rows: [P] int32, the row that each row of `part` replaces; a number out of range skips it. Or a slice, if `part` has
    one row, which is then copied to all rows of the slice.
    """
    n = part.slots
    new_PT = jnp.pad(part.positions_BT, ((0, 0), (0, cache.slots - n)), constant_values=-1)
    return LayerCache(
        cache.k_RBKHT.at[:, rows, :, :, :n].set(part.k_RBKHT, mode="drop"),
        cache.v_RBKTH.at[:, rows, :, :n].set(part.v_RBKTH, mode="drop"),
        cache.positions_BT.at[rows].set(new_PT, mode="drop"),
    )
