"""Layers of one kind stacked along a leading axis, run by `jax.lax.scan`."""

# B batch, S sequence, D model, R stacked layers

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxft.nn import partition
from jaxft.nn.adapter import bind_shared
from jaxft.nn.attention.borrowed import BorrowedAttention
from jaxft.nn.attention.cache import (
    Cache,
    LayerCache,
    MixerCache,
    NewKeys,
    StateCache,
    slots_for,
    write_positions,
)
from jaxft.nn.attention.decoding import write_new
from jaxft.nn.attention.kernels import cudnn
from jaxft.nn.attention.layer import Kept, Tokens
from jaxft.nn.block import Block
from jaxft.nn.experts.layer import read_stacks, stacks_of
from jaxft.nn.experts.router_sums import RouterSums

Module = TypeVar("Module", bound=nnx.Module)


def _save(*names: str) -> Callable[..., bool]:
    """Saves the values of these names (`checkpoint_name`) and the results of attention's kernel on GPUs."""
    policies = jax.checkpoint_policies
    return policies.save_from_both_policies(policies.save_only_these_names(*names), cudnn.save_kernel_results)


REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # Saves the results of the layers' matrix products, which have this name; everything between them is recomputed.
    "dots": _save("dots", "attention"),
    # Saves the results of attention, so that its kernel runs only once.
    "attention": _save("attention"),
    # Moves the input of each layer to host memory until the backward pass needs it.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(),
        names_which_can_be_offloaded=("stream",),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@dataclass(frozen=True)
class Segment:
    """Consecutive layers that repeat a pattern: `groups[p]` lists the layers at position p of the pattern."""

    first_group: int
    groups: tuple[tuple[int, ...], ...]


def layout(kinds: Sequence[Hashable]) -> tuple[Segment, ...]:
    """Divides layers of the given kinds into segments; each group of a segment is one scanned stack of equal layers.

    ("a",) * 4 is one group of four. ("l", "l", "g") * 4 + ("l",) is three groups of four, then one of one. The division
    with the fewest groups is used, because each group is compiled once.
    """
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    segments: list[Segment] = []
    first = 0
    for groups in _fewest(tuple(numbers[kind] for kind in kinds)):
        segments.append(Segment(first, groups))
        first += len(groups)
    return tuple(segments)


def group_layers(segments: tuple[Segment, ...]) -> tuple[tuple[int, ...], ...]:
    """The layer numbers of every group, in order."""
    return tuple(group for segment in segments for group in segment.groups)


Groups = tuple[tuple[int, ...], ...]


@functools.cache
def _fewest(kinds: tuple[int, ...]) -> list[Groups]:
    divisions = [_periodic(kinds, period) for period in range(1, len(kinds) + 1)]
    return min(divisions, key=lambda segments: sum(map(len, segments)), default=[])


def _periodic(kinds: tuple[int, ...], period: int) -> list[Groups]:
    repeats = 1
    while kinds[repeats * period : (repeats + 1) * period] == kinds[:period]:
        repeats += 1
    whole = repeats * period
    groups = tuple(tuple(range(p, whole, period)) for p in range(period))
    rest = [tuple(tuple(i + whole for i in g) for g in segment) for segment in _fewest(kinds[whole:])]
    return [groups, *rest]


def make_group(make: Callable[[nnx.Rngs], Module], count: int, rngs: nnx.Rngs) -> Module:
    """`count` layers as one module whose every parameter has a leading axis of `count`."""
    keys = jax.random.split(rngs.params(), count)
    return nnx.vmap(lambda key: make(nnx.Rngs(params=key)), in_axes=0, out_axes=0)(keys)


def run(
    groups: Sequence[Block],
    segments: tuple[Segment, ...],
    x_BSD: jax.Array,
    tokens: Tokens,
    *,
    cache: Cache | None,
    key: jax.Array | None,
    remat: str,
    routing: RouterSums | None = None,
    shared: Any = None,
    own_BSLP: jax.Array | None = None,
) -> tuple[jax.Array, Cache | None, RouterSums | None]:
    """Runs all layers in order; returns the activations, the cache with the new tokens, and the sums over routers.

    key: for dropout; None if nothing is random. routing: sums to which layers with experts add the statistics of their
    routers; None if no loss reads them. shared: arrays for the adapters of all layers (`Adapter.shared`); None if there
    are none. own_BSLP: the own input of every layer; None if layers have none. x_BSD: with AltUp [A, B, S, D].
    """
    caches = None if cache is None else _with_positions(cache, tokens)
    kept: dict[str, Kept] = {}
    for segment in segments:
        indices = slice(segment.first_group, segment.first_group + len(segment.groups))
        tokens_by_group = [tokens_of(group, tokens, kept) for group in groups[indices]]
        if cache is not None:
            tokens_by_group = [
                own._replace(cached_BT=before.positions_BT) if isinstance(before, LayerCache) else own
                for own, before in zip(tokens_by_group, cache[indices], strict=True)
            ]
        carry = _Carry(x_BSD, None if caches is None else caches[indices], routing, _none_kept(groups[indices], tokens))
        inputs = None if own_BSLP is None else [_of_layers(own_BSLP, layers) for layers in segment.groups]
        x_BSD, part, routing, last = _run_segment(
            groups[indices], segment, carry, tokens_by_group, key, remat, shared, inputs
        )
        if caches is not None and part is not None:
            caches[indices] = part
        for position, name in enumerate(map(kept_as, groups[indices])):
            if name is not None:
                at, index = segment.first_group + position, len(segment.groups[position]) - 1
                kept[name] = Kept(*last[name], _part(cache, at), _part(caches, at), index)
    return x_BSD, None if caches is None else tuple(caches), routing


Pair = tuple[jax.Array, jax.Array]  # keys and values


class _Carry(NamedTuple):
    """What one layer hands to the next. kept: of the last layer that keeps its keys and values under each name."""

    x_BSD: jax.Array
    caches: list[MixerCache | None] | None
    routing: RouterSums | None
    kept: dict[str, Pair]


def _part(cache: Sequence[MixerCache | None] | None, group: int) -> LayerCache | None:
    """The keys and values of a group; None without a cache."""
    part = None if cache is None else cache[group]
    return part if isinstance(part, LayerCache) else None


def kept_as(group: Block) -> str | None:
    """The name under which layers keep their keys and values; None if they keep none."""
    attention = getattr(group, "attention", None)
    return None if attention is None else attention.shape.kept_as


def tokens_of(group: Block, tokens: Tokens, kept: Mapping[str, Kept]) -> Tokens:
    """The tokens for layers, with the keys and values that they have not themselves."""
    attention = getattr(group, "attention", None)
    if not isinstance(attention, BorrowedAttention):
        return tokens
    source = kept[attention.shape.source]
    # Not in the carry of the layers that use them: it would be saved for each.
    positions_BT = None if source.before is None else source.before.positions_BT
    return tokens._replace(kept=source, cached_BT=positions_BT)


def _none_kept(groups: Sequence[Block], tokens: Tokens) -> dict[str, Pair]:
    """Zeros in the shape of what these layers keep."""
    return {name: group.attention.no_keys(tokens) for group in groups if (name := kept_as(group)) and group.attention}


def _of_layers(own_BSLP: jax.Array, layers: Sequence[int]) -> jax.Array:
    """The inputs of the layers of a group, [R, B, S, P]."""
    step = layers[1] - layers[0] if len(layers) > 1 else 1
    return jnp.moveaxis(own_BSLP[:, :, layers[0] : layers[-1] + 1 : step], 2, 0)


def _with_positions(cache: Cache, tokens: Tokens) -> list[MixerCache | None]:
    filled: list[MixerCache | None] = []
    for part in cache:
        if part is None:
            filled.append(None)
            continue
        if isinstance(part, StateCache):
            new_B = jnp.sum(tokens.segments_BS > 0, axis=1, dtype=jnp.int32)
            filled.append(part._replace(count_B=part.count_B + new_B))
            continue
        slots_BS = slots_for(tokens.positions_BS, tokens.segments_BS, part.slots)
        positions_BT = write_positions(part.positions_BT, slots_BS, tokens.positions_BS)
        filled.append(part._replace(positions_BT=positions_BT))
    return filled


def _run_segment(
    groups: Sequence[Block],
    segment: Segment,
    carry: _Carry,
    tokens_by_group: Sequence[Tokens],
    key: jax.Array | None,
    remat: str,
    shared: Any,
    own: Sequence[jax.Array] | None,
) -> _Carry:
    """own: of each group, the inputs of its layers [R, B, S, P]; None if they have none."""
    split = [nnx.split(group) for group in groups]
    graphdefs, states = [g for g, _ in split], [s for _, s in split]
    layers = jnp.array(segment.groups, jnp.int32).T  # [R, pattern]
    names, stacks = [kept_as(group) for group in groups], [stacks_of(group) for group in groups]

    def body(carry, scanned):
        x_BSD, caches, routing, kept = carry
        x_BSD = checkpoint_name(partition.split_stream(x_BSD), "stream")
        states, layers_P, index, own = scanned
        caches = list(caches) if caches is not None else [None] * len(graphdefs)
        later = [None] * len(graphdefs)
        for position, (graphdef, state) in enumerate(zip(graphdefs, states, strict=True)):
            layer_key = None if key is None else jax.random.fold_in(key, layers_P[position])
            module = nnx.merge(graphdef, state)
            read_stacks(module, stacks[position], index)
            if shared is not None:
                bind_shared(module, shared)
            parts = (x_BSD, tokens_by_group[position], caches[position], index, layer_key, routing)
            own_kept = None
            if own is None and names[position] is None:
                x_BSD, part, routing = module(*parts)
            else:
                x_BSD, part, routing, own_kept = module.with_kept(*parts, own and own[position])
            if isinstance(part, NewKeys):
                later[position] = part
            else:
                caches[position] = part
            if own_kept is not None:
                kept = kept | {names[position]: (own_kept.k_BSKH, own_kept.v_BSKH)}
        return _Carry(x_BSD, caches if carry.caches is not None else None, routing, kept), later

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    carry, later = jax.lax.scan(body, carry, (states, layers, jnp.arange(len(layers)), own))
    return carry if carry.caches is None else carry._replace(caches=_written(carry.caches, later, tokens_by_group))


def _written(
    caches: Sequence[MixerCache | None], later: Sequence[NewKeys | None], tokens_by_group: Sequence[Tokens]
) -> list[MixerCache | None]:
    """The caches of groups with what their layers left to be written."""
    written: list[MixerCache | None] = []
    for cache, new, tokens in zip(caches, later, tokens_by_group, strict=True):
        if new is not None and isinstance(cache, LayerCache):
            slots_B1 = slots_for(tokens.positions_BS, tokens.segments_BS, cache.slots)
            cache = write_new(cache, slots_B1, new)
        written.append(cache)
    return written
