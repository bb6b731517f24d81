"""Weights that are not numbers are refused: what is trained from a NaN is NaN, and nothing says where it came from."""

import numpy as np

from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.errors import CheckpointError

CHUNK = 2**16  # elements looked at together: they and their copy fit a core's cache
# Bits without the sign of infinity; whatever is more is NaN. Comparing bits is six times as fast as NumPy's isfinite
# for bfloat16, and faster than a copy.
INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F80_0000, "float64": 0x7FF0_0000_0000_0000}


class FiniteSource:
    """A source whose every block is checked as it is read. Raises CheckpointError naming the tensor, with counts."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor."""
        return self._source.specs()

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or a block of it; see `TensorSource.read`."""
        values = self._source.read(name, index)
        check_finite(name, values)
        return values


def check_finite(name: str, values: np.ndarray) -> None:
    """Raises CheckpointError where values hold NaN or infinity, with how many of each. name: of their tensor."""
    if all_finite(values):
        return
    found = values.astype(np.float32)
    nan, infinite = int(np.isnan(found).sum()), int(np.isinf(found).sum())
    raise CheckpointError(
        f"tensor {name!r} has {nan} NaN and {infinite} infinite values among the {values.size} that were read: the "
        "file is damaged, or its model had diverged. Tensors after it were not looked at. Fetch the weights again, "
        "or take them from an earlier step."
    )


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; true of whole numbers."""
    flat = values.ravel(order="K")
    if values.dtype.name not in INFINITY:
        return values.dtype.kind in "iub" or bool(np.isfinite(flat.astype(np.float32)).all())
    bits = np.dtype(f"u{values.dtype.itemsize}")
    flat, infinity, unsigned = (
        flat.view(bits),
        bits.type(INFINITY[values.dtype.name]),
        bits.type(np.iinfo(bits).max // 2),
    )
    room = np.empty(min(CHUNK, flat.size), bits)
    return all(
        np.bitwise_and(part, unsigned, out=room[: part.size]).max() < infinity
        for part in (flat[start : start + CHUNK] for start in range(0, flat.size, CHUNK))
    )
