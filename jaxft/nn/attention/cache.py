"""The cache of generation: preallocated, one entry per stack of layers.

Attention keeps keys and values in slots addressed by position; recurrent layers keep a state of constant size.
"""

# R stacked layers, B batch, S new tokens, T slots, K kv heads, H head_dim, N heads, X and Y sizes of a state, W taps,
# C channels

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


class StateCache(NamedTuple):
    """The states of a stack of recurrent layers after each row's last token, and the last inputs of their convolutions.

    state_RBNXY: float32. inputs_RBWC: the oldest first, zeros before the first token. count_B: int32, the tokens of
    each row so far.
    """

    state_RBNXY: jax.Array
    inputs_RBWC: jax.Array
    count_B: jax.Array


class NewKeys(NamedTuple):
    """Keys and values of new tokens, which a layer leaves to its stack to write (`nn.attention.decoding`)."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


MixerCache = LayerCache | StateCache
Cache = tuple[MixerCache | None, ...]  # one for each stack of layers; None for layers that look at no other position


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


def store(cache: Cache, part: Cache, rows: jax.Array | slice) -> Cache:
    """The cache with whole rows replaced by the rows of `part`, which may have fewer slots.

    rows: [P] int32, the row that each row of `part` replaces; a number out of range skips it. Or a slice, if `part` has
    one row, which is then copied to all rows of the slice.
    """
    return tuple(_store(*parts, rows) for parts in zip(cache, part, strict=True))


def _store(cache: MixerCache | None, part: MixerCache | None, rows: jax.Array | slice) -> MixerCache | None:
    if isinstance(cache, StateCache) and isinstance(part, StateCache):
        return StateCache(
            cache.state_RBNXY.at[:, rows].set(part.state_RBNXY, mode="drop"),
            cache.inputs_RBWC.at[:, rows].set(part.inputs_RBWC, mode="drop"),
            cache.count_B.at[rows].set(part.count_B, mode="drop"),
        )
    if not isinstance(cache, LayerCache) or not isinstance(part, LayerCache):
        return cache
    n = part.slots
    new_PT = jnp.pad(part.positions_BT, ((0, 0), (0, cache.slots - n)), constant_values=-1)
    return LayerCache(
        cache.k_RBKHT.at[:, rows, :, :, :n].set(part.k_RBKHT, mode="drop"),
        cache.v_RBKTH.at[:, rows, :, :n].set(part.v_RBKTH, mode="drop"),
        cache.positions_BT.at[rows].set(new_PT, mode="drop"),
    )


def first_row(cache: Cache) -> Cache:
    """A copy of the first of a cache's rows."""
    # Arrays of more than two axes have the stack's axis before that of the rows.
    return jax.tree.map(lambda x: x[:, :1] if x.ndim > 2 else x[:1], cache)


def cut(cache: Cache, count: int) -> Cache | None:
    """The cache without the tokens from `count` on, which become invisible; None if it cannot be cut there.

    A layer with a window has overwritten its oldest tokens by those beyond `count`, and a state holds all its tokens.
    """
    layers = [part for part in cache if isinstance(part, LayerCache)]
    states = [part for part in cache if isinstance(part, StateCache)]
    ends = [jnp.max(part.positions_BT) + 1 for part in layers] + [jnp.max(part.count_B) for part in states]
    written = max((int(end) for end in jax.device_get(ends)), default=0)
    if any(written > max(part.slots, count + 1) for part in layers) or (states and written != count):
        return None
    return tuple(
        part._replace(positions_BT=jnp.where(part.positions_BT < count, part.positions_BT, -1))
        if isinstance(part, LayerCache)
        else part
        for part in cache
    )
