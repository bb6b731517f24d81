"""Layers of one kind stacked along a leading axis, run by `jax.lax.scan`."""

# B batch, S sequence, D model, R stacked layers

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxft.nn import partition
from jaxft.nn.adapter import bind_shared
from jaxft.nn.attention import cudnn
from jaxft.nn.attention.cache import Cache, LayerCache, MixerCache, StateCache, slots_for, write_positions
from jaxft.nn.attention.layer import Tokens
from jaxft.nn.block import Block
from jaxft.nn.experts.router_sums import RouterSums
from jaxft.nn.partition import STREAM

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
) -> tuple[jax.Array, Cache | None, RouterSums | None]:
    """Runs all layers in order; returns the activations, the cache with the new tokens, and the sums over routers.

    key: for dropout; None if nothing is random. routing: sums to which layers with experts add the statistics of their
    routers; None if no loss reads them. shared: arrays for the adapters of all layers (`Adapter.shared`); None if there
    are none.
    """
    caches = None if cache is None else _with_positions(cache, tokens)
    for segment in segments:
        indices = slice(segment.first_group, segment.first_group + len(segment.groups))
        tokens_by_group = [tokens] * len(segment.groups)
        if cache is not None:
            tokens_by_group = [
                tokens._replace(cached_BT=before.positions_BT) if isinstance(before, LayerCache) else tokens
                for before in cache[indices]
            ]
        carry = (x_BSD, None if caches is None else caches[indices], routing)
        x_BSD, part, routing = _run_segment(groups[indices], segment, carry, tokens_by_group, key, remat, shared)
        if caches is not None and part is not None:
            caches[indices] = part
    return x_BSD, None if caches is None else tuple(caches), routing


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
    carry: tuple[jax.Array, list[MixerCache | None] | None, RouterSums | None],
    tokens_by_group: Sequence[Tokens],
    key: jax.Array | None,
    remat: str,
    shared: Any,
) -> tuple[jax.Array, list[MixerCache | None] | None, RouterSums | None]:
    split = [nnx.split(group) for group in groups]
    graphdefs, states = [g for g, _ in split], [s for _, s in split]
    layers = jnp.array(segment.groups, jnp.int32).T  # [R, pattern]

    def body(carry, scanned):
        x_BSD, caches, routing = carry
        x_BSD = checkpoint_name(partition.split(x_BSD, *STREAM), "stream")
        states, layers_P, index = scanned
        caches = list(caches) if caches is not None else [None] * len(graphdefs)
        for position, (graphdef, state) in enumerate(zip(graphdefs, states, strict=True)):
            layer_key = None if key is None else jax.random.fold_in(key, layers_P[position])
            module = nnx.merge(graphdef, state)
            if shared is not None:
                bind_shared(module, shared)
            x_BSD, caches[position], routing = module(
                x_BSD, tokens_by_group[position], caches[position], index, layer_key, routing
            )
        return (x_BSD, caches if carry[1] is not None else None, routing), None

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(body, carry, (states, layers, jnp.arange(len(layers))))[0]
