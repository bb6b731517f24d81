"""Experts on many devices: each device routes its own tokens; weights are gathered, rows go between expert shards.

The collectives are explicit, under `jax.shard_map`. Left to itself with a grouped matrix product, the compiler gathers
the rows of the whole batch on every device. Experts have no capacity limit here either, so the result equals that of
one device.

A device has its part of the batch's tokens, which the context and tensor axes split too, and those of the E experts
that belong to its index along the axis `expert`; these are split along both sides over the other axes. A layer's
communication in the forward pass (the backward pass sends as much in the other direction):

- over `fsdp`, `context` and `tensor`: the weights of the device's experts are gathered in the compute dtype; their
  gradient is reduce-scattered, and summed over `slice` and `data`.
- over `expert`, if it has e > 1 shards: rows go to the experts that they chose, and answers back (`experts.exchange`).
  XLA implements that on accelerators alone. On CPUs the rows of e devices and their choices are gathered; every device
  computes the outputs of its own experts in float32, which are reduce-scattered to the devices of the rows.

The buffer of that second form has room for the case that all rows choose experts of one device: e * M * min(K, E / e)
rows. It is mostly empty if choices are even.
"""

# B batch, S sequence, D model, F inner, E experts, K experts of one token, M tokens of a device, N tokens of all shards
# along `expert`, R rows of the buffer

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxft.nn import partition
from jaxft.nn.experts.exchange import EXPERT
from jaxft.nn.partition import Dimensions
from jaxft.nn.storage import StorageDims, storage_dims_of
from jaxft.quant import kernel_path
from jaxft.trees import path_str

ROWS: Dimensions = ("batch", "stream", None)


def divides(shape: tuple[int, ...]) -> bool:
    """Whether there is an ambient mesh over which the tokens of [B, S, D] divide evenly."""
    return not partition.is_unsharded() and not any(
        length % partition.shards(name) for length, name in zip(shape, ROWS, strict=True) if name is not None
    )


class ComputeLayer(Protocol):
    """A layer that computes in `dtype`."""

    dtype: jnp.dtype


Layer = TypeVar("Layer", bound=ComputeLayer)
Outputs = TypeVar("Outputs")


def on_mesh(compute: Callable[..., Outputs], layer: Layer, *inputs_BSD: jax.Array) -> Outputs:
    """`compute(layer, *inputs_MD)` on every device with its own tokens and the experts of its own shard.

    layer: an nnx.Module with parameters of `router`, and others whose first dimension is E. compute: returns a pytree
    of arrays [M, ...], which this function returns as [B, S, ...]. inputs_BSD: all of one shape.
    """
    graphdef, state = nnx.split(layer)
    flat, treedef = jax.tree_util.tree_flatten_with_path(state)
    paths = [path_str(path) for path, _ in flat]
    # In their stored layout, so that nothing moves before the call.
    declared = storage_dims_of(cast(nnx.Module, layer))
    storage = [_dimensions(declared.get(path), x.ndim) for path, (_, x) in zip(paths, flat, strict=True)]
    types = [layer.dtype if kernel_path(path) == path else x.dtype for path, (_, x) in zip(paths, flat, strict=True)]
    # A dimension that its axes do not divide is whole, as in small stored arrays.
    specs = [partition.spec(x.shape, dimensions, uneven=None) for (_, x), dimensions in zip(flat, storage, strict=True)]
    rows = partition.spec(inputs_BSD[0].shape, ROWS)

    def local(leaves: list[jax.Array], *inputs_BSD: jax.Array) -> Outputs:
        # Weights are gathered in the compute dtype, codes as they are.
        cast = [x.astype(dtype) for x, dtype in zip(leaves, types, strict=True)]
        whole = [_gather(x, spec, dimensions) for x, spec, dimensions in zip(cast, specs, storage, strict=True)]
        module = nnx.merge(graphdef, jax.tree.unflatten(treedef, whole))
        outputs = compute(module, *(x_BSD.reshape(-1, x_BSD.shape[-1]) for x_BSD in inputs_BSD))
        return jax.tree.map(lambda y: y.reshape(*inputs_BSD[0].shape[:2], *y.shape[1:]), outputs)

    # Neither an exchange nor kernels of other libraries declare along which axes their results vary.
    checked = partition.platform() == "cpu" and (expert_shards() == 1 or not exchanges())
    in_specs = (specs, *(rows for _ in inputs_BSD))
    apply = jax.shard_map(local, in_specs=in_specs, out_specs=P(*rows[:2]), check_vma=checked)
    return apply([x for _, x in flat], *inputs_BSD)


def expert_shards() -> int:
    """The number of parts into which the axis `expert` divides the experts."""
    return jax.sharding.get_abstract_mesh().shape.get(EXPERT, 1)


def exchanges() -> bool:
    """Whether chosen rows alone go between expert shards (`experts.exchange`), which XLA does not implement on CPUs."""
    return partition.platform() != "cpu"


def combine_over_shards(
    experts: Callable[[jax.Array, jax.Array], jax.Array],
    count: int,
    x_MD: jax.Array,
    weights_MK: jax.Array,
    experts_MK: jax.Array,
) -> jax.Array:
    """The weighted sum of the chosen experts' outputs, each computed on its own shard, [M, D] float32.

    experts(x_RD, sizes) -> [R, D]: this device's `count` experts on rows sorted by expert; rows beyond the sum of sizes
    are empty. For use under `on_mesh`.
    """
    x_ND, weights_NK, experts_NK = (jax.lax.all_gather(x, EXPERT, tiled=True) for x in (x_MD, weights_MK, experts_MK))
    chosen = experts_NK.shape[1]
    own = experts_NK.reshape(-1) - count * jax.lax.axis_index(EXPERT)
    own = jnp.where((own >= 0) & (own < count), own, count)  # `count`: of another shard, sorted last
    # A token chooses an expert at most once: no more than `count` of its choices are in this shard.
    order_R = jnp.argsort(own, stable=True)[: len(x_ND) * min(chosen, count)]
    sizes = jnp.bincount(own, length=count + 1)[:count].astype(jnp.int32)
    tokens_R = order_R // chosen
    filled_R1 = (jnp.arange(len(order_R)) < sizes.sum())[:, None]
    # Both before and after: a grouped matrix product leaves empty rows, and their gradient, undefined.
    rows_RD = jnp.where(filled_R1, x_ND[tokens_R], 0)
    rows_RD = jnp.where(filled_R1, experts(rows_RD, sizes).astype(jnp.float32), 0)
    rows_RD = rows_RD * weights_NK.reshape(-1)[order_R][:, None]
    y_ND = jnp.zeros(x_ND.shape, jnp.float32).at[tokens_R].add(rows_RD)
    return jax.lax.psum_scatter(y_ND, EXPERT, tiled=True)


def _dimensions(storage: StorageDims | None, count: int) -> Dimensions:
    """The `count` dimensions of a parameter when the layer receives it. The compiler gathers the small biases."""
    dims = (None,) * count if storage is None else storage.dims
    return tuple(None if name == "expert_both" else name for name in dims)


def _gather(x: jax.Array, spec: P, dimensions: Dimensions) -> jax.Array:
    for dimension, (entry, name) in enumerate(zip(spec, dimensions, strict=True)):
        axes = partition.mesh_axes(entry)
        if axes and name != EXPERT:  # a device's experts are its own
            x = jax.lax.all_gather(x, axes, axis=dimension, tiled=True)
    return x
