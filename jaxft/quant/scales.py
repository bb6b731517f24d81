"""Double quantisation: the scales of blocks compressed to 8 bits (arXiv:2305.14314, section 3)."""

# N blocks of inputs, O outputs, G groups of 256 scales

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp

from jaxft.quant.array import TINY
from jaxft.quant.dynamic import dynamic_map, nearest

GROUP = 256


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CompressedScales:
    """codes: uint8 [..., N, O], of the signed dynamic map. largest: float32 [..., G], the largest magnitude of each
    group of 256 scales, in the order of all blocks of one output, then those of the next. mean: float32 [...], of all
    scales.
    """

    codes: jax.Array
    largest: jax.Array
    mean: jax.Array

    def expand(self) -> jax.Array:
        """The scales, float32 [..., N, O]."""
        *stack, count, outputs = self.codes.shape
        # Every group's magnitude is broadcast to its scales by reshaping: no lookup, no communication.
        largest = jnp.broadcast_to(self.largest[..., None], (*self.largest.shape, GROUP)).reshape(*stack, -1)
        largest = jnp.swapaxes(largest[..., : count * outputs].reshape(*stack, outputs, count), -1, -2)
        levels = jnp.take(jnp.asarray(dynamic_map(signed=True)), self.codes.astype(jnp.int32), axis=0)
        return levels * largest + self.mean[..., None, None]

    def map_arrays(self, change: Callable[[jax.Array], jax.Array]) -> Self:
        """A copy with `change` applied to `codes`, as `QuantizedArray.map_arrays` does."""
        return dataclasses.replace(self, codes=change(self.codes))


def dense_scales(scales: jax.Array | CompressedScales) -> jax.Array:
    """The scales, [..., N, O] float32, expanded if they are compressed."""
    return scales.expand() if isinstance(scales, CompressedScales) else scales


def compress(scales: jax.Array, mean: jax.Array | None = None) -> CompressedScales:
    """Compresses scales, float32 [..., N, O]. mean: float32 [...], computed if None."""
    *stack, count, outputs = scales.shape
    mean = _mean(scales) if mean is None else mean
    flat = jnp.swapaxes(scales - mean[..., None, None], -1, -2).reshape(*stack, -1)
    groups = math.ceil(count * outputs / GROUP)
    flat = jnp.pad(flat, [(0, 0)] * len(stack) + [(0, groups * GROUP - count * outputs)])
    grouped = flat.reshape(*stack, groups, GROUP)
    largest = jnp.max(jnp.abs(grouped), axis=-1)
    # All scales of a group may equal the mean, as in a matrix of zeros.
    codes = nearest(grouped * (1.0 / jnp.maximum(largest, TINY))[..., None], signed=True)
    codes = jnp.where(largest[..., None] > 0, codes, 0)
    codes = codes.reshape(*stack, -1)[..., : count * outputs].reshape(*stack, outputs, count)
    return CompressedScales(jnp.swapaxes(codes, -1, -2), largest, mean)


def _mean(scales: jax.Array) -> jax.Array:
    # Residuals of a first mean are small, so adding their mean removes the rounding error of a million float32 sums.
    first = scales.mean(axis=(-2, -1), keepdims=True)
    return (first + (scales - first).mean(axis=(-2, -1), keepdims=True))[..., 0, 0]
