"""Arrays over the devices of several processes: made from the parts of each process, and copied to host memory."""

# B batch

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jaxft.trees import is_key

Tree = TypeVar("Tree")  # a pytree of arrays


def from_rows(make: Callable[[slice], Any], rows: int, sharding: NamedSharding) -> Any:
    """A pytree of global arrays [B, ...]. This process makes only the rows of its own devices. make(slice): these rows
    as a pytree of numpy arrays. rows: B. sharding: splits only B.
    """
    indices = sharding.addressable_devices_indices_map((rows,)).values()
    cuts = sorted({index[0].indices(rows)[:2] for index in indices if index is not None})
    parts = {cut: make(slice(*cut)) for cut in cuts}

    def join(*leaves: np.ndarray) -> jax.Array:
        leaf_of = dict(zip(parts, leaves, strict=True))
        shape = (rows, *leaves[0].shape[1:])

        def rows_at(index: tuple[slice, ...] | None) -> np.ndarray:
            return leaf_of[index[0].indices(rows)[:2] if index else (0, rows)]

        return jax.make_array_from_callback(shape, sharding, rows_at)

    return jax.tree.map(join, *parts.values())


def put_global(x: jax.Array, sharding: Sharding) -> jax.Array:
    """Puts x on the devices of a sharding, which may span processes. Every process must pass the same x."""
    if sharding.is_fully_addressable or not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    if is_key(x):
        data = put_global(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    # device_put would first compare the copies of all processes over the network.
    whole = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: whole[index])


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array in the host memory of every process. All must call this, in the same order.

    Meanwhile, an array that spans processes is whole on every device.
    """
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def host_parts(
    x: jax.Array, bounds: Sequence[tuple[int, int]], dtype: DTypeLike
) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """A block of an array in host memory, in parts (index in the block, part): one for each shard that overlaps the
    block.

    bounds: (start, stop) along every axis. dtype: cast to it on the devices. `x` keeps no copy of the block. If the
    array spans processes, the block is one part, which is meanwhile whole on every device and in every process. All
    processes must call this, in the same order.
    """
    if not x.is_fully_addressable:
        whole = _gather_block(x, bounds, dtype)
        yield (slice(None),) * x.ndim, np.asarray(whole)
        return
    for shard in x.addressable_shards:
        offsets = [cut.indices(size)[0] for cut, size in zip(shard.index, x.shape, strict=True)]
        low = [max(start, offset) for (start, _), offset in zip(bounds, offsets, strict=True)]
        ends = [offset + size for offset, size in zip(offsets, shard.data.shape, strict=True)]
        high = [min(stop, end) for (_, stop), end in zip(bounds, ends, strict=True)]
        if shard.replica_id or any(a >= b for a, b in zip(low, high, strict=True)):
            continue
        starts = np.asarray([a - offset for a, offset in zip(low, offsets, strict=True)], np.int32)
        part = _cut(shard.data, starts, tuple(b - a for a, b in zip(low, high, strict=True)), np.dtype(dtype))
        index = tuple(slice(a - start, b - start) for a, b, (start, _) in zip(low, high, bounds, strict=True))
        yield index, np.asarray(part)


@functools.partial(jax.jit, static_argnames=("sizes", "dtype"))
def _cut(x: jax.Array, starts: np.ndarray, sizes: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    return jax.lax.dynamic_slice(x, starts, sizes).astype(dtype)


def _gather_block(x: jax.Array, bounds: Sequence[tuple[int, int]], dtype: DTypeLike) -> jax.Array:
    # If an axis is split, the compiler must know the start; otherwise it gathers the whole axis first. On other axes it
    # need not know it, so that one program serves all layers.
    split = [local < size for local, size in zip(x.sharding.shard_shape(x.shape), x.shape, strict=True)]
    starts = np.asarray([0 if known else start for (start, _), known in zip(bounds, split, strict=True)], np.int32)
    known = tuple(tuple(cut) if known else None for cut, known in zip(bounds, split, strict=True))
    sizes = tuple(stop - start for start, stop in bounds)
    if not isinstance(x.sharding, NamedSharding):
        raise TypeError(f"an array that spans processes needs a NamedSharding, not {type(x.sharding).__name__}")
    return _cut_and_gather(x, starts, known, sizes, np.dtype(dtype), NamedSharding(x.sharding.mesh, P()))


@functools.partial(jax.jit, static_argnames=("known", "sizes", "dtype", "everywhere"))
def _cut_and_gather(
    x: jax.Array,
    starts: np.ndarray,
    known: tuple[tuple[int, int] | None, ...],
    sizes: tuple[int, ...],
    dtype: np.dtype,
    everywhere: NamedSharding,
) -> jax.Array:
    """The block whole on every device. known: (start, stop) of the split axes, None for others."""
    kept = [n if cut is None else size for n, cut, size in zip(sizes, known, x.shape, strict=True)]
    part = jax.lax.dynamic_slice(x, starts, kept)
    cuts = [cut or (0, n) for n, cut in zip(sizes, known, strict=True)]
    block = jax.lax.slice(part, [start for start, _ in cuts], [stop for _, stop in cuts]).astype(dtype)
    return jax.lax.with_sharding_constraint(block, everywhere)
