"""Refuses numbers that are NaN or infinite, in weights that are read or written and in states that are saved: training
from a NaN gives only NaN, whose origin nothing shows.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.errors import CheckpointError, listed

REMEDY = (
    "The same command with train.on_spike='skip' goes on and leaves out the updates that would cause this; or train "
    "into another output_dir with a lower optim.learning_rate, with optim.clip_norm, or in float32."
)
CHUNK = 2**16  # elements checked at a time: they and their copy fit into the cache of a core
# The bits of infinity without the sign; larger ones are NaN. Comparing bits is six times as fast as NumPy's isfinite
# for bfloat16, and faster than a copy.
INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F80_0000, "float64": 0x7FF0_0000_0000_0000}


class FiniteSource:
    """A source that checks every block it reads. Raises CheckpointError naming the tensor and counting its values."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    def specs(self) -> dict[str, TensorSpec]:
        return self._source.specs()

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        values = self._source.read(name, index)
        if values.dtype.kind in "iubc":
            raise CheckpointError(
                f"tensor {name!r} is stored as {values.dtype}, and weights have a type with fractions: the file was "
                "quantised, or cast by mistake. Take the weights in their own precision."
            )
        check_finite(name, values)
        return values


def check_finite(name: str, values: np.ndarray) -> None:
    """Raises CheckpointError, with their numbers, if any value is NaN or infinite. name: of the tensor."""
    if all_finite(values):
        return
    values_f32 = values.astype(np.float32)
    nan, infinite = int(np.isnan(values_f32).sum()), int(np.isinf(values_f32).sum())
    raise CheckpointError(
        f"tensor {name!r} has {nan} NaN and {infinite} infinite values among the {values.size} that were read: the "
        "file is damaged, or its model had diverged. Tensors after it were not checked. Fetch the weights again, "
        "or take them from an earlier step."
    )


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; True for integers."""
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


def check_state(step: int, arrays: Mapping[str, jax.Array], whole: str) -> None:
    """Refuses a state that is to be saved if an array of it is not finite, weights, optimizer and averages alike.

    The devices look at their own parts and answer with one number, so that no array leaves them. arrays: by path.
    whole: the newest whole step, for people. All processes call this. Raises CheckpointError naming the arrays.
    """
    groups: dict[frozenset[jax.Device], dict[str, jax.Array]] = {}
    for path, array in arrays.items():
        if jnp.issubdtype(array.dtype, jnp.inexact):
            groups.setdefault(frozenset(array.sharding.device_set), {})[path] = array
    answers = [_finite(group) for group in groups.values()]
    if all(bool(whole_group) for whole_group, _ in answers):
        return
    bad = [path for _, each in answers for path, finite in each.items() if not finite]
    raise CheckpointError(
        f"step {step} is not saved: {len(bad)} of the {len(arrays)} arrays of its state have NaN or infinite values "
        f"({listed(bad, 4)}), so training has diverged although the loss was finite; {whole}. {REMEDY}"
    )


@jax.jit
def _finite(arrays: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(whether all are finite, whether each is)."""
    each = {path: jnp.isfinite(array).all() for path, array in arrays.items()}
    return jnp.stack(list(each.values())).all(), each
