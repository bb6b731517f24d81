"""Experts on many devices: each routes its own rows; only weights and, between experts' devices, rows travel.

Written out under `jax.shard_map`, since the compiler, left alone with a grouped multiplication, gathers the rows of the
whole batch on every device. No expert has a capacity here either: the result is that of one device.

A device holds its part of the batch's tokens, which the context and tensor axes split too, and, of the E experts, those
of its place along `expert`, split along both sides over the other axes. What travels for a layer in the forward pass
(the backward pass sends as much the other way):

- over `fsdp`, `context` and `tensor`, the weights of the device's experts, gathered in the type of computation; their
  gradient is reduced and scattered, and added up over `slice` and `data`.
- over `expert`, where it has e > 1 places, the rows of e devices and their choices, gathered; every device answers for
  its own experts in float32, and the answers are added up and scattered to where the rows came from. So each row meets
  all e places whatever it chose, where an exchange of chosen rows would send it to at most K: cheap while e is small.

The buffer of sorted rows has room for all rows choosing experts of one device, e * M * min(K, E / e) of them. It is
mostly empty when they choose evenly, and a grouped multiplication need not compute what is empty.
"""

# D model, F inner, E experts, K experts of one token, M tokens of a device, N tokens of all places along `expert`,
# R rows of the buffer

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxft.nn import partition
from jaxft.nn.partition import Dimensions
from jaxft.nn.storage import StorageDims, storage_dims_of
from jaxft.quant import kernel_path
from jaxft.trees import path_str

EXPERT = "expert"
ROWS = ("batch", "stream", None)


def divides(shape: tuple[int, ...]) -> bool:
    """Whether there is an ambient mesh whose devices each take equally many tokens of [B, S, D]."""
    return not partition.is_unsharded() and not any(
        length % partition.shards(name) for length, name in zip(shape, ROWS, strict=True) if name is not None
    )


def on_mesh(work: Callable[[nnx.Module, jax.Array], Any], layer: nnx.Module, x_BSD: jax.Array) -> Any:
    """`work(layer, x_MD)` by every device on its own tokens, its layer holding the experts of its place alone.

    layer: parameters of `router`, and of others whose first dimension is E. work: gives arrays [M, ...], which come
    back as [B, S, ...].
    """
    graphdef, state = nnx.split(layer)
    flat, treedef = jax.tree_util.tree_flatten_with_path(state)
    paths = [path_str(path) for path, _ in flat]
    # As they are at rest, so that nothing moves on the way in.
    declared = storage_dims_of(layer)
    storage = [_dimensions(declared.get(path), x.ndim) for path, (_, x) in zip(paths, flat, strict=True)]
    types = [layer.dtype if kernel_path(path) == path else x.dtype for path, (_, x) in zip(paths, flat, strict=True)]
    # A dimension that its axes do not divide is whole, as in small arrays at rest.
    specs = [partition.spec(x.shape, dimensions, uneven=None) for (_, x), dimensions in zip(flat, storage, strict=True)]
    rows = partition.spec(x_BSD.shape, ROWS)

    def local(leaves: list[jax.Array], x_BSD: jax.Array) -> Any:
        # Weights in the type that they are used in, codes as they are.
        cast = [x.astype(dtype) for x, dtype in zip(leaves, types, strict=True)]
        whole = [_gather(x, spec, dimensions) for x, spec, dimensions in zip(cast, specs, storage, strict=True)]
        done = work(nnx.merge(graphdef, treedef.unflatten(whole)), x_BSD.reshape(-1, x_BSD.shape[-1]))
        return jax.tree.map(lambda y: y.reshape(*x_BSD.shape[:2], *y.shape[1:]), done)

    apply = jax.shard_map(local, in_specs=(specs, rows), out_specs=P(*rows[:2]))
    return apply([x for _, x in flat], x_BSD)


def places() -> int:
    """Among how many devices the experts are divided."""
    return partition.shards("expert")


def together(
    experts: Callable[[jax.Array, jax.Array], jax.Array],
    count: int,
    x_MD: jax.Array,
    weights_MK: jax.Array,
    experts_MK: jax.Array,
) -> jax.Array:
    """The weighted sum of what the chosen experts give, each at its place along `expert` -> [M, D] float32.

    experts(x_RD, sizes) -> [R, D]: this device's `count` experts on rows sorted by them, those past the last being no
    rows. To be called under `on_mesh`.
    """
    x_ND, weights_NK, experts_NK = (
        jax.lax.all_gather(given, EXPERT, tiled=True) for given in (x_MD, weights_MK, experts_MK)
    )
    chosen = experts_NK.shape[1]
    own = experts_NK.reshape(-1) - count * jax.lax.axis_index(EXPERT)
    own = jnp.where((own >= 0) & (own < count), own, count)  # `count`: of another place, sorted behind the own ones
    # A token chooses an expert once: no more than `count` of its choices are here.
    order_R = jnp.argsort(own, stable=True)[: len(x_ND) * min(chosen, count)]
    sizes = jnp.bincount(own, length=count + 1)[:count].astype(jnp.int32)
    tokens_R = order_R // chosen
    filled_R1 = (jnp.arange(len(order_R)) < sizes.sum())[:, None]
    # Both ways: what a grouped multiplication leaves in empty rows, or in their gradient, is not said.
    rows_RD = jnp.where(filled_R1, x_ND[tokens_R], 0)
    rows_RD = jnp.where(filled_R1, experts(rows_RD, sizes).astype(jnp.float32), 0)
    rows_RD = rows_RD * weights_NK.reshape(-1)[order_R][:, None]
    y_ND = jnp.zeros(x_ND.shape, jnp.float32).at[tokens_R].add(rows_RD)
    return jax.lax.psum_scatter(y_ND, EXPERT, tiled=True)


def _dimensions(storage: StorageDims | None, count: int) -> Dimensions:
    """Of a parameter of `count` dimensions on its way into the layer. Biases are small: the compiler gathers them."""
    dims = (None,) * count if storage is None else storage.dims
    return tuple(None if name == "expert_both" else name for name in dims)


def _gather(x: jax.Array, spec: P, dimensions: Dimensions) -> jax.Array:
    for dimension, (entry, name) in enumerate(zip(spec, dimensions, strict=True)):
        axes = partition.mesh_axes(entry)
        if axes and name != EXPERT:  # a device's experts are its own
            x = jax.lax.all_gather(x, axes, axis=dimension, tiled=True)
    return x
