"""How stored parameters are split over devices. Each module declares it for its own parameters; meshes read it here.

A module with parameters has a method `storage_dims() -> {name of the parameter: StorageDims}`. A module that contains
others may declare their parameters too, by path, and then overrides them.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
from flax import nnx

from jaxft.nn.partition import Dimensions
from jaxft.quant import QuantizedArray
from jaxft.trees import flatten


class StorageDims(NamedTuple):
    """The dimensions of a stored parameter, without those of stacks, which are in front and never split.

    fallback: the dimensions to use if the mesh cannot split the parameter evenly by `dims`. may_be_whole: whether an
    array of any size may be whole on every device, because it is a small part of a larger object, such as the scales of
    a kernel.
    """

    dims: Dimensions
    fallback: Dimensions | None = None
    may_be_whole: bool = False


@runtime_checkable
class HasStorageDims(Protocol):
    """A module with parameters of its own."""

    def storage_dims(self) -> Mapping[str, StorageDims]:
        """The dimensions of every stored parameter, by its path from this module."""


def storage_dims_of(module: nnx.Module) -> dict[str, StorageDims]:
    """The declarations of a module, which may be abstract, and of all modules inside it, by the path of every array.

    In a quantized kernel, arrays with the kernel's axes are split like the kernel, others only along the axes in front
    of the matrix (experts).
    """
    modules = [("/".join(map(str, path)), part) for path, part in nnx.iter_modules(module)]
    declared: dict[str, StorageDims] = {}
    # The longest paths first: a module comes after those inside it.
    for path, part in sorted(modules, key=lambda each: len(each[0]), reverse=True):
        if isinstance(part, HasStorageDims):
            declared |= {f"{path}/{name}" if path else name: dims for name, dims in part.storage_dims().items()}
    values = flatten(nnx.state(module, nnx.Param), lambda x: isinstance(x, QuantizedArray))[0]
    for path, value in values.items():
        if isinstance(value, QuantizedArray) and path in declared:
            declared |= {f"{path}/{name}": dims for name, dims in _part_dims(value, declared[path]).items()}
    return declared


def _part_dims(value: QuantizedArray, kernel: StorageDims) -> dict[str, StorageDims]:
    with_axes: set[int] = set()

    def note(part: jax.Array) -> jax.Array:
        with_axes.add(id(part))
        return part

    value.map_arrays(note)
    before = kernel.dims[:-2]
    out = {}
    for name, part in flatten(value)[0].items():
        rest = (None,) * (part.ndim - (value.ndim - 2))
        out[name] = kernel if id(part) in with_axes else StorageDims((*before, *rest), may_be_whole=True)
    return out
