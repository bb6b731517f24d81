"""The layout of a model over a mesh while it generates: no weight travels from token to token.

A mesh for training may keep every matrix in parts, over `fsdp`, `expert` and `context`, and gather each for use. That
pays for a batch of whole rows, but a decoding step has one token of each row, so it would wait for all weights to
arrive. For generation the same devices are another mesh with two axes: `data`, over which rows are split, and `tensor`,
over which matrices and the heads of the KV cache are split. The parameters are brought there once.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from jaxft.errors import ConfigError
from jaxft.nn.decoder import Decoder
from jaxft.nn.param_kind import in_adapter, kind_of
from jaxft.nn.partition import AXES
from jaxft.nn.storage import StorageDims, storage_dims_of
from jaxft.sharding.mesh import MeshPlan
from jaxft.trees import flatten

# Bytes of weights on a device, below which splitting them further would spare less time than the exchange of tokens
# between more devices takes. An estimate: a TPU v5e reads 1 GiB in 1.3 ms, and 64 small sums over devices take about
# as long.
ENOUGH = 2**30

Shape = tuple[str, tuple[int, ...]]  # path and shape of an array


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sharding and the type of every parameter of a model while it generates, in tree order."""

    shardings: tuple[NamedSharding, ...]
    dtypes: tuple[np.dtype, ...]


def for_decoding(model: Decoder, *, tensor: int | None = None) -> Decoder:
    """The model with its parameters in the layout for generation; the model itself if they are in it already, as on one
    device.

    The result has copies of the parameters, which are freed with it. Matrices that layers round to the type of
    computation anyway are copied in that type. `generate_tokens` calls this function; a caller that generates several
    times with the same parameters on a mesh calls it once before.
    tensor: the size of the axis `tensor`. By default the smallest that leaves at most `ENOUGH` bytes of weights on a
    device; if there is none, the largest that divides the heads of the KV cache; never less than that of the mesh that
    the parameters are on. Raises ConfigError for a size that does not divide devices, heads or arrays.
    """
    graphdef, params = nnx.split(model)
    layout = layout_of(model, tensor=tensor)
    if layout is None:
        return model
    arrays, treedef = jax.tree.flatten(params)
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, _mover(layout.shardings, layout.dtypes)(arrays)))


def layout_of(model: Decoder, *, tensor: int | None = None) -> Layout | None:
    """The layout that `for_decoding` brings the parameters to; None if they are in it already.

    model: its parameters may be ShapeDtypeStructs with shardings, also on an abstract mesh. tensor, and the errors:
    those of `for_decoding`.
    """
    params = nnx.state(model)
    mesh = mesh_of(params)
    if mesh is None:
        return None
    own = mesh.shape.get("tensor", 1)
    ways = math.prod(size for axis, size in mesh.shape.items() if axis not in AXES["replica"])
    if ways == own and tensor in (None, own):
        return None
    arrays, _ = flatten(params)
    dtypes = _dtypes(model, arrays)
    if tensor is None:
        weights = sum(x.size * dtype.itemsize for x, dtype in zip(arrays.values(), dtypes, strict=True))
        sizes = _sizes_in_order(model, own, ways, weights)
    elif ways % tensor == 0 and tensor % own == 0:
        sizes = (tensor,)
    else:
        raise ConfigError(
            f"tensor={tensor} must be a multiple of the mesh's tensor={own} that divides {ways}, the number of devices "
            "that share one copy of the weights"
        )
    shapes = tuple((path, tuple(x.shape)) for path, x in arrays.items())
    shardings = _shardings(mesh, sizes, shapes, tuple(storage_dims_of(model).items()))
    return Layout(shardings=shardings, dtypes=dtypes)


def mesh_of(params: nnx.State) -> Mesh | None:
    """The mesh that parameters are on; None if that is a single device. Of abstract parameters it may be abstract."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    meshes = (s.mesh for s in shardings if isinstance(s, NamedSharding))
    return next((cast(Mesh, mesh) for mesh in meshes if mesh.size > 1), None)


def _sizes_in_order(model: Decoder, own: int, ways: int, weights: int) -> tuple[int, ...]:
    """Sizes of the axis `tensor`, the best first. weights: bytes of all parameters."""
    heads = math.gcd(*(count for block in model.config.shape().layers for count in block.heads))
    sizes = [n for n in range(own, ways + 1, own) if n == own or (ways % n == 0 and heads % n == 0)]
    small = [n for n in sizes if weights / n <= ENOUGH]
    return (*small, *(n for n in reversed(sizes) if n not in small))


def _dtypes(model: Decoder, arrays: Mapping[str, jax.Array]) -> tuple[np.dtype, ...]:
    """The type to copy every array in. Adapters may compute with the exact kernels of their layers."""
    exact = any(map(in_adapter, arrays))
    wide = np.dtype(model.dtype).itemsize

    def dtype_of(path: str, x: jax.Array) -> np.dtype:
        rounded = jax.numpy.issubdtype(x.dtype, np.floating) and x.dtype.itemsize > wide
        return np.dtype(model.dtype if rounded and not exact and kind_of(path, x.ndim).base_matrix else x.dtype)

    return tuple(dtype_of(path, x) for path, x in arrays.items())


@functools.cache
def _shardings(
    mesh: Mesh, sizes: tuple[int, ...], shapes: tuple[Shape, ...], dims: tuple[tuple[str, StorageDims], ...]
) -> tuple[NamedSharding, ...]:
    """The sharding of every array on the mesh for generation, with the first size that divides all of them."""
    tree = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes}
    for size in sizes:
        plan = MeshPlan(mesh=_in_two_axes(mesh, size))
        try:
            shardings = plan.shardings(tree, dict(dims))
        except ConfigError:
            if size == sizes[-1]:
                raise
            continue
        return tuple(shardings[path] for path, _ in shapes)
    raise ValueError("no sizes")


def _in_two_axes(mesh: Mesh, tensor: int) -> Mesh:
    """The devices of a mesh, or of an abstract one, along the axes `data` and `tensor`."""
    names, types = ("data", "tensor"), (AxisType.Auto,) * 2
    if isinstance(mesh, AbstractMesh):
        return cast(Mesh, AbstractMesh((mesh.size // tensor, tensor), names, axis_types=types))
    # The axis `tensor` is the last of every mesh, so that its groups stay.
    return Mesh(mesh.devices.reshape(-1, tensor), names, axis_types=types)


@functools.cache
def _mover(
    shardings: tuple[NamedSharding, ...], dtypes: tuple[np.dtype, ...]
) -> Callable[[Sequence[jax.Array]], list[jax.Array]]:
    """Brings arrays to other shardings. Only the codes of quantised kernels travel, and rounded matrices."""

    def move(arrays: Sequence[jax.Array]) -> list[jax.Array]:
        return [x.astype(dtype) for x, dtype in zip(arrays, dtypes, strict=True)]

    return jax.jit(move, out_shardings=list(shardings))
