"""Layouts of activations and gathered weights on the ambient mesh, which `jax.set_mesh` sets.

Layers name the dimensions of their arrays; this file alone maps each kind of dimension to mesh axes. Without an ambient
mesh, on one device and inside `shard_map`, every function here returns its argument unchanged.
"""

# B batch, S sequence, D model

from functools import partial
from typing import Any, Literal

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

# batch: rows. replica: rows, for products with weights that stay split. sequence: positions within a layer, whose heads
# or inner units the tensor axis splits. stream: positions between layers, which the tensor axis splits too
# (arXiv:2205.05198). weight: the side of a matrix that is gathered for use. both: a side that the tensor axis splits
# and that is gathered. all_axes: a side of a small matrix, gathered over the tensor axis too. expert: experts.
# expert_weight: the side of an expert's matrix that is gathered. expert_both: a side of it that the tensor axis splits
# and that is gathered.
Dimension = Literal[
    "batch", "replica", "sequence", "stream", "tensor", "weight", "both", "all_axes", "expert", "expert_weight",
    "expert_both",
]  # fmt: skip
Dimensions = tuple[Dimension | None, ...]  # of an array, one a dimension; None: not split
AXES: dict[Dimension, tuple[str, ...]] = {
    "batch": ("slice", "data", "fsdp", "expert"),
    "replica": ("slice", "data"),
    "sequence": ("context",),
    "stream": ("context", "tensor"),
    "tensor": ("tensor",),
    "weight": ("fsdp", "expert", "context"),
    "expert": ("expert",),
    "expert_weight": ("fsdp", "context"),
    "expert_both": ("fsdp", "context", "tensor"),
    "both": ("tensor", "fsdp", "expert", "context"),
    "all_axes": ("tensor", "fsdp", "expert", "context"),
}


def platform() -> str:
    """cpu, gpu or tpu: the platform of the ambient mesh. Its devices may be abstract, for compilation ahead of time."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """What JAX calls a device of the ambient mesh, such as `TPU v5 lite`. It may be abstract, as for `platform`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def shards(dimension: Dimension) -> int:
    """The number of parts into which the ambient mesh splits a dimension."""
    count = 1
    for axis in axes_of(dimension):
        count *= jax.sharding.get_abstract_mesh().shape[axis]
    return count


def axes_of(dimension: Dimension) -> tuple[str, ...]:
    """The axes of the ambient mesh that split a dimension, without axes of size 1 and those that `shard_map` uses."""
    mesh = jax.sharding.get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
    return tuple(axis for axis in AXES[dimension] if axis in free and mesh.shape[axis] > 1)


def spec(shape: tuple[int, ...], dimensions: Dimensions, *, uneven: Any = P.UNCONSTRAINED) -> P:
    """The PartitionSpec of an array with these dimensions; None: not split. uneven: the entry for a dimension that its
    axes do not divide; by default XLA chooses its layout.
    """
    entries: list[Any] = []
    for length, dimension in zip(shape, dimensions, strict=True):
        axes = () if dimension is None else axes_of(dimension)
        even = dimension is None or length % shards(dimension) == 0
        entries.append((axes or None) if even else uneven)
    return P(*entries)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def split(x: jax.Array, *dimensions: Dimension | None, uneven: Any = P.UNCONSTRAINED) -> jax.Array:
    """x with the layout of these dimensions; its gradient has the same layout. uneven: as for `spec`."""
    return x if is_unsharded() else jax.lax.with_sharding_constraint(x, spec(x.shape, dimensions, uneven=uneven))


def split_only(x: jax.Array, dimension: int) -> jax.Array:
    """x split along this dimension only, by the axes that weights are gathered over, if they divide it; else x."""
    axes = axes_of("weight")
    if is_unsharded() or not axes or x.shape[dimension] % shards("weight"):
        return x
    # In two steps, each of which is one collective: dimensions that the tensor axis splits are gathered last.
    for rest in (P.UNCONSTRAINED, None):
        entries = [axes if index == dimension else rest for index in range(x.ndim)]
        x = jax.lax.with_sharding_constraint(x, P(*entries))
    return x


def gather(x: jax.Array, storage: Dimensions, whole: Dimensions) -> jax.Array:
    """x, laid out as `storage`, brought to the layout `whole`; its gradient is brought back to `storage`.

    A plain constraint would also apply to the gradient: every device would receive the whole sum of all devices'
    gradients and discard all but its own part.
    """
    return x if is_unsharded() else _gather(x, spec(x.shape, storage), spec(x.shape, whole))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, storage: P, whole: P) -> jax.Array:
    # The first constraint prevents the compiler from gathering x earlier, while it still has a wider dtype.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, storage), whole)


def _gather_forward(x: jax.Array, storage: P, whole: P) -> tuple[jax.Array, None]:
    return _gather(x, storage, whole), None


def _gather_backward(storage: P, whole: P, _: None, grad: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(grad, storage),)


_gather.defvjp(_gather_forward, _gather_backward)


def reduce_scatter(x: jax.Array, result: Dimensions, gradient: Dimensions) -> jax.Array:
    """The sum of x over the devices that each have a summand of it, laid out as `result`; its gradient is brought to
    the layout `gradient`, once for all devices that need it.
    """
    return x if is_unsharded() else _reduce_scatter(x, spec(x.shape, result), spec(x.shape, gradient))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _reduce_scatter(x: jax.Array, result: P, gradient: P) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, result)


def _reduce_scatter_forward(x: jax.Array, result: P, gradient: P) -> tuple[jax.Array, None]:
    return _reduce_scatter(x, result, gradient), None


def _reduce_scatter_backward(result: P, gradient: P, _: None, grad: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(grad, gradient),)


_reduce_scatter.defvjp(_reduce_scatter_forward, _reduce_scatter_backward)


STREAM: Dimensions = ("batch", "stream", None)
WHOLE: Dimensions = ("batch", "sequence", None)


def whole(x_BSD: jax.Array) -> jax.Array:
    """The residual stream with all positions of a device's rows, for matrices that the tensor axis splits."""
    return gather(x_BSD, STREAM, WHOLE)


def stream(x_BSD: jax.Array) -> jax.Array:
    """The output of such matrices, summed and split along positions as the residual stream is."""
    return reduce_scatter(x_BSD, STREAM, WHOLE)


def split_stream(x: jax.Array) -> jax.Array:
    """The residual stream [B, S, D], or several of them [A, B, S, D], split as it is between layers."""
    return split(x, *(None,) * (x.ndim - len(STREAM)), *STREAM)


def is_unsharded() -> bool:
    """True without an ambient mesh, on one device, and inside `shard_map`: then there is no layout to choose."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1 or all(kind == AxisType.Manual for kind in mesh.axis_types)
