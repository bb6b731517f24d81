"""Layers of one kind stacked along a leading axis, run by `jax.lax.scan`."""

# B batch, S sequence, D model, R stacked layers

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxft.nn import partition
from jaxft.nn.adapter import lend
from jaxft.nn.attention import cudnn
from jaxft.nn.attention.cache import Cache, LayerCache, slots_for, write_positions
from jaxft.nn.attention.layer import Tokens
from jaxft.nn.block import STREAM
from jaxft.nn.experts.router_sums import RouterSums


def _kept(*names: str) -> Callable[..., bool]:
    """Keeps what has one of these names, and what attention's kernel on GPUs gives."""
    policies = jax.checkpoint_policies
    return policies.save_from_both_policies(policies.save_only_these_names(*names), cudnn.kept)


REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    # Results of the layers' matrix products, which name themselves; what lies between them is recomputed.
    "dots": _kept("dots", "attention"),
    # What attention gives, whose kernel would run once more.
    "attention": _kept("attention"),
    # What enters each layer goes to the host's memory until the backward pass comes for it.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(),
        names_which_can_be_offloaded=("stream",),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@dataclass(frozen=True)
class Segment:
    """A run of layers that repeats a pattern: `groups[p]` lists the layers at place p of the pattern."""

    first_group: int
    groups: tuple[tuple[int, ...], ...]


def layout(kinds: Sequence[Hashable]) -> tuple[Segment, ...]:
    """How layers of the given kinds are stacked: each group is one scanned stack of equal layers.

    ("a",) * 4 is one group of four. ("l", "l", "g") * 4 + ("l",) is three groups of four, then one
    of one. The division with the fewest groups wins, since each group is compiled once.
    """
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    segments, first = [], 0
    for groups in _fewest(tuple(numbers[kind] for kind in kinds)):
        segments.append(Segment(first, groups))
        first += len(groups)
    return tuple(segments)


def group_layers(segments: tuple[Segment, ...]) -> tuple[tuple[int, ...], ...]:
    """For every group in order, the layer numbers that it stacks."""
    return tuple(group for segment in segments for group in segment.groups)


Groups = tuple[tuple[int, ...], ...]


@functools.cache
def _fewest(kinds: tuple[int, ...]) -> list[Groups]:
    found = [_periodic(kinds, period) for period in range(1, len(kinds) + 1)]
    return min(found, key=lambda segments: sum(map(len, segments)), default=[])


def _periodic(kinds: tuple[int, ...], period: int) -> list[Groups]:
    repeats = 1
    while kinds[repeats * period : (repeats + 1) * period] == kinds[:period]:
        repeats += 1
    whole = repeats * period
    groups = tuple(tuple(range(p, whole, period)) for p in range(period))
    rest = [tuple(tuple(i + whole for i in g) for g in segment) for segment in _fewest(kinds[whole:])]
    return [groups, *rest]


def make_group(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` layers as one module whose every parameter has a leading axis of `count`."""
    keys = jax.random.split(rngs.params(), count)
    return nnx.vmap(lambda key: make(nnx.Rngs(params=key)), in_axes=0, out_axes=0)(keys)


def run(
    groups: Sequence[nnx.Module],
    segments: tuple[Segment, ...],
    x_BSD: jax.Array,
    tokens: Tokens,
    *,
    cache: Cache | None,
    key: jax.Array | None,
    remat: str,
    routing: RouterSums | None = None,
    lent: Any = None,
) -> tuple[jax.Array, Cache | None, RouterSums | None]:
    """All layers in order. key: for dropout; None when nothing is random.

    routing: where layers with experts add what their routers did; None where nobody asks. lent: arrays for the adapters
    of all layers.
    """
    caches = _with_positions(cache, tokens) if cache is not None else None
    for segment in segments:
        here = slice(segment.first_group, segment.first_group + len(segment.groups))
        part = caches[here] if caches is not None else None
        of_layer = [tokens] * len(segment.groups)
        if cache is not None:
            of_layer = [tokens._replace(held_BT=before.positions_BT) for before in cache[here]]
        carry = (x_BSD, part, routing)
        x_BSD, part, routing = _run_segment(groups[here], segment, carry, of_layer, key, remat, lent)
        if caches is not None:
            caches[here] = part
    return x_BSD, tuple(caches) if caches is not None else None, routing


def _with_positions(cache: Cache, tokens: Tokens) -> list[LayerCache]:
    filled = []
    for part in cache:
        slots_BS = slots_for(tokens.positions_BS, tokens.segments_BS, part.slots)
        positions_BT = write_positions(part.positions_BT, slots_BS, tokens.positions_BS)
        filled.append(part._replace(positions_BT=positions_BT))
    return filled


def _run_segment(groups, segment, carry, tokens_of_place, key, remat, lent):
    split = [nnx.split(group) for group in groups]
    graphdefs, states = [g for g, _ in split], [s for _, s in split]
    layers = jnp.array(segment.groups, jnp.int32).T  # [R, pattern]

    def body(carry, scanned):
        x_BSD, caches, routing = carry
        x_BSD = checkpoint_name(partition.split(x_BSD, *STREAM), "stream")
        states, layers_P, index = scanned
        caches = list(caches) if caches is not None else [None] * len(graphdefs)
        for place, (graphdef, state) in enumerate(zip(graphdefs, states, strict=True)):
            layer_key = None if key is None else jax.random.fold_in(key, layers_P[place])
            module = nnx.merge(graphdef, state)
            if lent is not None:
                lend(module, lent)
            x_BSD, caches[place], routing = module(
                x_BSD, tokens_of_place[place], caches[place], index, layer_key, routing
            )
        return (x_BSD, caches if caches[0] is not None else None, routing), None

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(body, carry, (states, layers, jnp.arange(len(layers))))[0]
