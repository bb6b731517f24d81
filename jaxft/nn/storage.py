"""How parameters are split over the devices at rest: every module declares it for its own, the mesh reads it here.

A module with parameters has a method `storage_dims() -> {name of the parameter: StorageDims}`. A module that contains
others may declare theirs as well, by their path from it, and is then the one that counts.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from flax import nnx

from jaxft.nn.partition import Dimensions
from jaxft.quant import QuantizedArray
from jaxft.trees import flatten


class StorageDims(NamedTuple):
    """What the last dimensions of a parameter are at rest; those before them, of stacks, are whole.

    fallback: what they are instead if the mesh does not divide the parameter by `dims`. slight: the array is a small
    part of what it belongs to, so that it may be whole on every device however many elements it has.
    """

    dims: Dimensions
    fallback: Dimensions | None = None
    slight: bool = False


@runtime_checkable
class Stores(Protocol):
    """A module with parameters of its own."""

    def storage_dims(self) -> Mapping[str, StorageDims]:
        """What the dimensions of every parameter are at rest, by its path from here."""


def storage_dims_of(module: nnx.Module) -> dict[str, StorageDims]:
    """What the modules inside a module declare, itself included, by the path of every array. Also of abstract ones.

    In a quantized kernel, an array with the kernel's axes is split like the kernel; others, one for each matrix or for
    many weights, only by the axes before the matrix.
    """
    modules = [("/".join(map(str, path)), part) for path, part in nnx.iter_modules(module)]
    declared = {}
    # The longest paths first: a module comes after those inside it.
    for path, part in sorted(modules, key=lambda each: len(each[0]), reverse=True):
        if isinstance(part, Stores):
            declared |= {f"{path}/{name}" if path else name: dims for name, dims in part.storage_dims().items()}
    values = flatten(nnx.state(module, nnx.Param), lambda x: isinstance(x, QuantizedArray))[0]
    for path, value in values.items():
        if isinstance(value, QuantizedArray) and path in declared:
            declared |= {f"{path}/{name}": dims for name, dims in _quantized(value, declared[path]).items()}
    return declared


def _quantized(value: QuantizedArray, kernel: StorageDims) -> dict[str, StorageDims]:
    with_axes = object()
    marks = flatten(value.map_arrays(lambda part: with_axes))[0]
    before = kernel.dims[:-2]
    out = {}
    for name, part in flatten(value)[0].items():
        rest = (None,) * (part.ndim - (value.ndim - 2))
        out[name] = kernel if marks[name] is with_axes else StorageDims((*before, *rest), slight=True)
    return out
