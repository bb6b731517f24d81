"""PartitionSpecs of arrays on a mesh, from the dimensions of stored parameters.

Modules declare the dimensions of their parameters (`jaxft.nn.storage`). An array whose path ends like a parameter's,
such as its gradient or a moment of its optimizer, is split like the parameter; OPTIMIZER_DIMS is for the other arrays
of optimizers. All others, scalars and PRNG keys are whole on every device.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jax.sharding import PartitionSpec as P

from jaxft.errors import ConfigError, listed
from jaxft.nn.param_kind import in_adapter
from jaxft.nn.partition import AXES, Dimension, Dimensions
from jaxft.nn.storage import StorageDims

BIG = 2**16  # elements; a larger array must be split when fsdp > 1

log = logging.getLogger(__name__)


def _block_scales(path: str, storage: StorageDims) -> Dimensions:
    # Blocks lie along the side that the tensor axis splits (`optim/eight_bit`); their scales do not split this side.
    if in_adapter(path):
        return ("both",)
    return tuple(None if name == "tensor" else name for name in storage.dims)


def _along_last(path: str, storage: StorageDims) -> Dimensions:
    return ("both",)


# Arrays that optimizers keep for a parameter in another shape, by the last part of their path: scales of 8-bit codes,
# Adafactor's means over rows [L, I] and columns [L, O], APOLLO's projected moments [L, r, N].
OPTIMIZER_DIMS: dict[str, Callable[[str, StorageDims], Dimensions]] = {
    "absmax": _block_scales,
    "row": _along_last,
    "col": _along_last,
    "low": _along_last,
}


class Leaf(NamedTuple):
    """One array of a state. splittable: False for PRNG keys."""

    path: str
    shape: tuple[int, ...]
    splittable: bool


def specs_of(leaves: Sequence[Leaf], dims: Mapping[str, StorageDims], axes: Mapping[str, int]) -> list[P]:
    """The PartitionSpec of every array.

    dims: of stored parameters, by path, from `storage_dims_of(model)`. axes: mesh axis name -> size. Raises ConfigError
    for a big array with a dimension that its axes do not divide and, if axes that split weights are larger than one,
    for a big array that would be whole on every device. Small arrays that do not divide are left whole and logged.
    """
    assignment = _Assignment(axes)
    specs = [assignment.spec(leaf, storage_of(leaf.path, dims)) for leaf in leaves]
    assignment.report()
    return specs


def storage_of(path: str, dims: Mapping[str, StorageDims]) -> StorageDims | None:
    """The dimensions of the array at a path of any state: those of the parameter with the longest path that ends it."""
    parameter = _parameter(path, dims)
    if parameter is not None:
        return dims[parameter]
    owner, _, name = path.rpartition("/")
    parameter = _parameter(owner, dims)
    if parameter is None or name not in OPTIMIZER_DIMS:
        return None
    return StorageDims(OPTIMIZER_DIMS[name](parameter, dims[parameter]), may_be_whole=True)


def _parameter(path: str, dims: Mapping[str, StorageDims]) -> str | None:
    parts = path.split("/")
    return next((end for end in ("/".join(parts[i:]) for i in range(len(parts))) if end in dims), None)


@dataclass
class _Assignment:
    """The specs on one mesh, and the arrays that do not fit it."""

    axes: Mapping[str, int]
    misfits: list[str] = field(default_factory=list)
    misfit_lengths: list[int] = field(default_factory=list)
    whole: list[Leaf] = field(default_factory=list)
    small: list[str] = field(default_factory=list)

    def spec(self, leaf: Leaf, storage: StorageDims | None) -> P:
        """The axes of the leaf's last dimensions; a dimension that its axes do not divide is whole."""
        storage = StorageDims(()) if storage is None or not leaf.splittable or not leaf.shape else storage
        dims = storage.dims
        if storage.fallback is not None and not self._divides(dims, leaf.shape):
            dims = storage.fallback
        big = math.prod(leaf.shape) > BIG and not storage.may_be_whole
        if len(dims) > len(leaf.shape):
            self._misfit(leaf, big, f"has {len(leaf.shape)} dimensions, but is declared as {dims}")
            dims = ()
        dims = (None,) * (len(leaf.shape) - len(dims)) + dims
        entries, parts = [], 1
        for axis, (name, length) in enumerate(zip(dims, leaf.shape, strict=True)):
            # One scale for all inputs has nothing to split.
            names = () if length == 1 else self._names(name)
            count = self._count(names)
            if length % count:
                text = f"{'x'.join(names)}={count} does not divide dimension {axis} = {length}"
                self._misfit(leaf, big, text, length)
                names, count = (), 1
                parts = 0 if big else parts  # an array is reported only once, as a misfit
            entries.append(names or None)
            parts *= count
        if parts == 1 and big and self._count(self._names("weight")) > 1:
            self.whole.append(leaf)
        while entries and entries[-1] is None:
            entries.pop()  # P() and P(None, None) mean the same but compare unequal
        return P(*entries)

    def _names(self, name: Dimension | None) -> tuple[str, ...]:
        # Axes of one device split nothing, and specs that differ only in them would compare unequal.
        return () if name is None else tuple(axis for axis in AXES[name] if self.axes.get(axis, 1) > 1)

    def _count(self, names: Sequence[str]) -> int:
        return math.prod(self.axes[axis] for axis in names)

    def _divides(self, dims: Dimensions, shape: tuple[int, ...]) -> bool:
        lengths = zip(reversed(dims), reversed(shape), strict=False)
        return all(length % self._count(self._names(name)) == 0 for name, length in lengths)

    def _misfit(self, leaf: Leaf, big: bool, text: str, length: int | None = None) -> None:
        (self.misfits if big else self.small).append(f"{leaf.path} {list(leaf.shape)}: {text}")
        if big and length is not None:
            self.misfit_lengths.append(length)

    def report(self) -> None:
        """Raises ConfigError for big arrays, logs small ones."""
        if self.misfits:
            devices = math.prod(self.axes.values())
            fits = divisors(devices, lambda d: all(length % d == 0 for length in self.misfit_lengths))
            mesh = ", ".join(f"{axis}={size}" for axis, size in self.axes.items() if size > 1)
            raise ConfigError(
                f"the mesh ({mesh}) cannot split these arrays into equal shards:\n{listed(self.misfits, lines=True)}\n"
                f"Set the axis to one of {', '.join(map(str, fits))}: they divide these dimensions and the {devices} "
                "devices."
            )
        if self.whole:
            lines = [f"{leaf.path} {list(leaf.shape)}: {math.prod(leaf.shape):,} elements" for leaf in self.whole]
            sizes = ", ".join(f"{axis}={self.axes[axis]}" for axis in self._names("weight"))
            raise ConfigError(
                f"{sizes}, but these arrays of more than {BIG:,} elements would be whole on every device:\n"
                f"{listed(lines, lines=True)}\nName a dimension to split in `storage_dims` of the module that has "
                "them, or in OPTIMIZER_DIMS of jaxft.sharding.specs for an optimizer's."
            )
        if self.small:
            log.warning("left whole on every device, being small:\n%s", listed(self.small, lines=True))


def divisors(number: int, fits: Callable[[int], bool] = lambda divisor: True) -> list[int]:
    """The divisors of a number that meet a condition, the smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0 and fits(n)]
